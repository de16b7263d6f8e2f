/** The arrays that decoding needs, from `attention/state` and `attention/bias`. */

import type { Metadata } from "./arrays";
import { readTable } from "./arrays";
import type { Attributes } from "./attributes";
import { damaged, missing, type Files } from "./files";
import { STATE_DTYPES, StateArray, type StateDtype } from "../codecs/state";
import { CacheError } from "./types";

const FOR_WRITING = ["metric_LVE", "input_call_L"];

/** The shape behind the layer axis that each array of codec `transform` must have; null for a side that others fix.
 * Those of the projection may be missing. */
function shapes(attributes: Attributes, width: number): Record<string, (number | null)[]> {
  const { heads, numKvHeads, headDim, numTokens } = attributes.geometry;
  const numOutputs = (heads.length + numKvHeads) * headDim;
  const numPairs = Math.floor(headDim / 2);
  return {
    basis_LJC: [null, width],
    bucket_LBJ: [null, null],
    mean_left_LTR: [numTokens, null],
    mean_right_LRC: [null, width],
    prediction_LCC: [width, width],
    prediction_scale_LC: [width],
    shrink_L3: [3],
    projection_weight_NC: [numOutputs, width],
    projection_bias_N: [numOutputs],
    projection_q_norm__weight_D: [headDim],
    projection_q_norm__bias_D: [headDim],
    projection_q_norm__eps_1: [1],
    projection_k_norm__weight_D: [headDim],
    projection_k_norm__bias_D: [headDim],
    projection_k_norm__eps_1: [1],
    projection_rotation__cos_HTP: [null, numTokens, numPairs],
    projection_rotation__sin_HTP: [null, numTokens, numPairs],
    projection_rotation__is_adjacent_1: [1],
  };
}

/** Arrays of the projection, by the array that they come with. */
const COMPANIONS: Record<string, string> = {
  projection_bias_N: "projection_weight_NC",
  projection_weight_NC: "projection_bias_N",
  projection_q_norm__weight_D: "projection_q_norm__eps_1",
  projection_k_norm__weight_D: "projection_k_norm__eps_1",
  projection_rotation__cos_HTP: "projection_rotation__sin_HTP",
  projection_rotation__sin_HTP: "projection_rotation__is_adjacent_1",
};

/** The codec's arrays, by name; none but for codec `transform`. */
export async function readState(
  files: Files,
  metadata: Metadata,
  attributes: Attributes,
): Promise<Map<string, StateArray>> {
  const state = new Map<string, StateArray>();
  if (attributes.codec.name !== "transform") return state;
  const known = Object.keys(shapes(attributes, 0));
  const stranger = metadata.names("attention/state")?.find((name) => ![...known, ...FOR_WRITING].includes(name));
  if (stranger !== undefined) {
    throw new CacheError(
      "unknown-format",
      `${files.place}attention/state/${stranger}: this page does not know such an array. It is older than the cache.`,
    );
  }
  await Promise.all(
    known.map(async (name) => {
      const array = await readArray(files, metadata, `attention/state/${name}`);
      if (array !== null) state.set(name, array);
      else if (!name.startsWith("projection_")) throw missing(files.place, `attention/state/${name}`);
    }),
  );
  checkState(files, state, attributes);
  return state;
}

function checkState(files: Files, state: Map<string, StateArray>, attributes: Attributes): void {
  const { layers, heads, numKvHeads } = attributes.geometry;
  const wanted = shapes(attributes, state.get("basis_LJC")!.shape[2]);
  for (const [name, { shape }] of state) {
    const [numLayers, ...sides] = shape;
    const expected = wanted[name];
    const fits =
      numLayers === layers.length &&
      sides.length === expected.length &&
      sides.every((side, axis) => expected[axis] === null || expected[axis] === side);
    if (!fits) throw damaged(files.place, `attention/state/${name}`, `its shape is ${shape.join(" x ")}`);
  }
  const side = (name: string, axis: number): number | undefined => state.get(name)?.shape[axis];
  const numAngles = side("projection_rotation__cos_HTP", 1) ?? 1;
  const numOutputs = (heads.length + numKvHeads) * attributes.geometry.headDim;
  const agree =
    (state.has("projection_weight_NC") || side("basis_LJC", 2) === numOutputs) &&
    side("bucket_LBJ", 2) === side("basis_LJC", 1) &&
    side("mean_left_LTR", 2) === side("mean_right_LRC", 1) &&
    state.get("bucket_LBJ")!.dtype === "uint8" &&
    [1, numKvHeads].includes(numAngles) &&
    (side("projection_rotation__sin_HTP", 1) ?? 1) === numAngles &&
    heads.length % numAngles === 0;
  if (!agree) throw damaged(files.place, "attention/state", "its arrays contradict each other");
  for (const [name, companion] of Object.entries(COMPANIONS)) {
    if (state.has(name) && !state.has(companion)) throw missing(files.place, `attention/state/${companion}`);
  }
}

/** The teacher's bias, (layer, 1 or head, query, key); null if it has none, or maps have it in them. */
export async function readBias(
  files: Files,
  metadata: Metadata,
  attributes: Attributes,
): Promise<StateArray | null> {
  if (attributes.codec.name === "logmap") return null;
  const bias = await readArray(files, metadata, "attention/bias");
  if (bias === null) return null;
  const { layers, heads, numTokens } = attributes.geometry;
  const [numLayers, numHeads, ...sides] = bias.shape;
  const fits = numLayers === layers.length && [1, heads.length].includes(numHeads) && sides.length === 2;
  if (!fits || sides.some((side) => side !== numTokens) || bias.dtype !== "float32") {
    throw damaged(files.place, "attention/bias", `its shape is ${bias.shape.join(" x ")}`);
  }
  return bias;
}

async function readArray(files: Files, metadata: Metadata, path: string): Promise<StateArray | null> {
  const info = await metadata.array(path);
  if (info === null) return null;
  if (!Object.hasOwn(STATE_DTYPES, info.dtype)) throw damaged(files.place, path, `its type is ${info.dtype}`);
  return new StateArray(await readTable(files, info), info.shape, info.dtype as StateDtype);
}
