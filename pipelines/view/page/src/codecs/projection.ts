/** Codec `transform`: q and k from a layer's input. */

import { splitHeads, type Shape } from "./layers";
import { makePanels, multiply, type Panels } from "./products";
import type { StateArray } from "./state";

/** The arrays `projection_*` of the state, by the rest of their names. */
export type Projection = Map<string, StateArray>;

/** The weight (output, width) of a layer as the right factor of a product. */
export function projectionPanels(weight: Float32Array, width: number): Panels {
  return makePanels(weight, width, weight.length / width, 1, width);
}

/** q and k (head, token, D) of the layer at `position`, from its input x (token, width); without a weight, x is q and k. */
export function project(
  x: Float32Array,
  width: number,
  weight: Panels | null,
  projection: Projection,
  position: number,
  shape: Shape,
): [Float32Array, Float32Array] {
  if (weight === null) return splitHeads(x, width, shape);
  const numOutputs = weight.columns;
  const vectors = multiply(x, shape.numTokens, weight);
  const bias = projection.get("bias_N")!.floats(position);
  for (let from = 0; from < vectors.length; from += numOutputs) {
    for (let output = 0; output < numOutputs; output++) vectors[from + output] += bias[output];
  }
  const [q, k] = splitHeads(vectors, numOutputs, shape);
  for (const [name, heads] of [["q_norm", q], ["k_norm", k]] as const) normalise(heads, name, projection, position, shape);
  for (const heads of [q, k]) rotate(heads, projection, position, shape);
  return [q, k];
}

/** In place: an RMS norm over D, or a layer norm if there is a bias. Nothing if the teacher has none. */
function normalise(heads: Float32Array, name: string, projection: Projection, position: number, shape: Shape): void {
  const weight = projection.get(`${name}__weight_D`)?.floats(position);
  if (weight === undefined) return;
  const bias = projection.get(`${name}__bias_D`)?.floats(position);
  const eps = projection.get(`${name}__eps_1`)!.floats(position)[0];
  const width = shape.headDim;
  for (let start = 0; start < heads.length; start += width) {
    let mean = 0;
    if (bias !== undefined) for (let d = 0; d < width; d++) mean += heads[start + d] / width;
    let square = 0;
    for (let d = 0; d < width; d++) square += (heads[start + d] - mean) ** 2 / width;
    const size = Math.sqrt(square + eps);
    for (let d = 0; d < width; d++) {
      heads[start + d] = ((heads[start + d] - mean) / size) * weight[d] + (bias?.[d] ?? 0);
    }
  }
}

/** In place: the rotary position embedding. Nothing if the teacher has none. */
function rotate(heads: Float32Array, projection: Projection, position: number, shape: Shape): void {
  const cosines = projection.get("rotation__cos_HTP")?.floats(position);
  if (cosines === undefined) return;
  const sines = projection.get("rotation__sin_HTP")!.floats(position);
  const isAdjacent = projection.get("rotation__is_adjacent_1")!.floats(position)[0] === 1;
  const { numTokens, headDim } = shape;
  const numPairs = Math.floor(headDim / 2);
  const numAngles = cosines.length / (numTokens * numPairs); // 1, or k's heads, which q's heads share
  const numHeads = heads.length / (numTokens * headDim);
  for (let head = 0; head < numHeads; head++) {
    const angles = numAngles === 1 ? 0 : Math.floor((head * numAngles) / numHeads);
    for (let token = 0; token < numTokens; token++) {
      const start = (head * numTokens + token) * headDim;
      const angleStart = (angles * numTokens + token) * numPairs;
      for (let pair = 0; pair < numPairs; pair++) {
        const first = start + (isAdjacent ? 2 * pair : pair);
        const second = isAdjacent ? first + 1 : first + numPairs;
        const a = heads[first];
        const b = heads[second];
        const cosine = cosines[angleStart + pair];
        const sine = sines[angleStart + pair];
        heads[first] = a * cosine - b * sine;
        heads[second] = a * sine + b * cosine;
      }
    }
  }
}
