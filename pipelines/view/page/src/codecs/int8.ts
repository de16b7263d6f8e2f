/** Codec `int8`: vectors of int8 codes, with a float16 scale each. */

import { halfTable } from "./halves";
import { FactorLayer, splitHeads, type Shape } from "./layers";

/** A layer from its codes, (token, `numComponents`): codes of all vectors, then their scales in two bytes each. */
export function decodeInt8(
  codes: Uint8Array<ArrayBuffer>,
  numComponents: number,
  shape: Shape,
  bias: Float32Array | null,
): FactorLayer {
  const { numHeads, numKvHeads, headDim, numTokens } = shape;
  const numVectors = numHeads + numKvHeads;
  const signed = new Int8Array(codes.buffer, codes.byteOffset, codes.length);
  const halves = halfTable();
  const width = numVectors * headDim;
  const vectors = new Float32Array(numTokens * width);
  for (let token = 0, to = 0; token < numTokens; token++) {
    let from = token * numComponents;
    let scaleAt = from + width;
    for (let vector = 0; vector < numVectors; vector++, scaleAt += 2) {
      const scale = halves[codes[scaleAt] | (codes[scaleAt + 1] << 8)];
      for (let d = 0; d < headDim; d++) vectors[to++] = signed[from++] * scale;
    }
  }
  const [q, k] = splitHeads(vectors, width, shape);
  return new FactorLayer(shape, q, k, bias);
}
