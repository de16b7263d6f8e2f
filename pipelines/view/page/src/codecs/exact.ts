/** Codec `exact`: codes are the bits of float16 or float32. */

import { halvesToFloats } from "./halves";
import { FactorLayer, splitHeads, type Shape } from "./layers";

/** A layer from its codes, (token, `numComponents`), in bytes. What is stored behind q and k (v, inputs) is no part of
 * a map. */
export function decodeExact(
  codes: Uint8Array<ArrayBuffer>,
  isHalf: boolean,
  numComponents: number,
  shape: Shape,
  bias: Float32Array | null,
): FactorLayer {
  const vectors = isHalf ? halvesToFloats(new Uint16Array(codes.buffer)) : new Float32Array(codes.buffer);
  const [q, k] = splitHeads(vectors, numComponents, shape);
  return new FactorLayer(shape, q, k, bias);
}
