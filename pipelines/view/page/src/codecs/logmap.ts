/** Codec `logmap`: the maps themselves, in logarithmic levels. */

import { MapLayer, type Shape } from "./layers";

/** A layer from its codes, (query, head, key). */
export function decodeLogmap(codes: Uint8Array, bits: number, shape: Shape): MapLayer {
  const { numHeads, numQueries, numTokens } = shape;
  const level = levels(bits, numTokens);
  const maps = new Float32Array(numHeads * numQueries * numTokens);
  for (let query = 0, from = 0; query < numQueries; query++) {
    for (let head = 0; head < numHeads; head++) {
      const start = (head * numQueries + query) * numTokens;
      let total = 0;
      for (let key = 0; key < numTokens; key++) total += maps[start + key] = level[codes[from++]];
      total = Math.max(total, 1e-30); // rows of zeros, which no encoder writes, stay zero
      for (let key = 0; key < numTokens; key++) maps[start + key] /= total;
    }
  }
  return new MapLayer(shape, maps);
}

/** The probability of each code, up to the row's sum. */
function levels(bits: number, numTokens: number): Float64Array {
  const slope = (2 ** bits * numTokens) / 16;
  const step = Math.log1p(slope) / (2 ** bits - 2);
  return Float64Array.from({ length: 256 }, (_, code) =>
    code === 0 ? 0 : Math.expm1((code === 1 ? 0.1 : code - 1) * step) / slope,
  );
}
