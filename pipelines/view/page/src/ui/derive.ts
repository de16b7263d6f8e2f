/** From the decoded rows to what is drawn: the chosen row of each cache, their difference, the scales. */

import type { Cache, Tokens } from "../cache/types";
import type { Scale } from "./colours";
import type { Lane } from "./lane";
import { isRollout, type State } from "./state";
import { combineHeads, divergence, patchQuantile, rowOf, subtract, totalVariation, type Wall } from "./values";

/** The shown row over all keys, or the sentence that says why there is none; null while it is on its way. */
export type Row = Float32Array | string | null;

export function chosenRow(lane: Lane, state: State): Row {
  const { cache, wall } = lane;
  if (lane.unanswered) return lane.unanswered;
  if (isRollout(state)) return lane.rollout?.mode === state.mode ? lane.rollout.row : null;
  const layer = cache.layers.indexOf(state.layer);
  if (layer < 0) return `Layer ${state.layer} is not stored in ${lane.name}.`;
  if (!wall?.ready[layer]) return null;
  if (state.mode === "mean" || state.mode === "max") return combineHeads(wall, layer, state.mode);
  const head = cache.heads.indexOf(state.head);
  return head < 0 ? `Head ${state.head} is not stored in ${lane.name}.` : rowOf(wall, layer, head);
}

export function haveSameTokens(a: Tokens, b: Tokens): boolean {
  return a.numPrefix === b.numPrefix && a.gridHeight === b.gridHeight && a.gridWidth === b.gridWidth;
}

/** The token of another layout at the same place: a student may have other patches, or no registers. Null for none. */
export function tokenAtSamePlace(token: number, from: Tokens, to: Tokens): number | null {
  if (token < from.numPrefix) return token < to.numPrefix ? token : null;
  const patch = token - from.numPrefix;
  const [row, column] = [Math.floor(patch / from.gridWidth), patch % from.gridWidth];
  const along = (place: number, length: number, other: number) => Math.floor(((place + 0.5) / length) * other);
  const place = along(row, from.gridHeight, to.gridHeight) * to.gridWidth + along(column, from.gridWidth, to.gridWidth);
  return to.numPrefix + place;
}

/** The stored queries of `cache` that a query of `tokens` is. */
export function queriesFor(cache: Cache, query: number[], tokens: Tokens): number[] {
  const own = query.map((token) => tokenAtSamePlace(token, tokens, cache.tokens));
  return [...new Set(own.filter((token) => token !== null && cache.queries.includes(token)))] as number[];
}

export interface Difference {
  row: Float32Array;
  /** Nats. */
  klAB: number;
  klBA: number;
  totalVariation: number;
}

export function differenceOf(a: Row, b: Row): Difference | null {
  if (!(a instanceof Float32Array && b instanceof Float32Array) || a.length !== b.length) return null;
  return { row: subtract(a, b), klAB: divergence(a, b), klBA: divergence(b, a), totalVariation: totalVariation(a, b) };
}

/** Whether A and B show the same view of the same sample, for the same query: only then have they a difference. While
 * one of them is on its way, the other may be ahead of it. */
export function canCompare(a: Lane, b: Lane): boolean {
  const [one, other] = [a.shown, b.shown];
  const isSameView = one !== null && one.sample.key === other?.sample.key && one.view === other.view;
  return isSameView && haveSameTokens(a.cache.tokens, b.cache.tokens) && String(a.wallQuery) === String(b.wallQuery);
}

/** A minus B in all layers and heads that both have; axes as A's. */
export function differenceWall(a: Lane, b: Lane): Wall | null {
  if (!a.wall || !b.wall || a.wall.numKeys !== b.wall.numKeys) return null;
  const wall: Wall = { ...a.wall, values: new Float32Array(a.wall.values.length), ready: a.wall.ready.map(() => false) };
  a.cache.layers.forEach((index, layer) => {
    const other = b.cache.layers.indexOf(index);
    if (other < 0 || !a.wall!.ready[layer] || !b.wall!.ready[other]) return;
    wall.ready[layer] = true;
    a.cache.heads.forEach((name, head) => {
      const otherHead = b.cache.heads.indexOf(name);
      const row = rowOf(wall, layer, head);
      // No number: 0 would say that there is no difference.
      if (otherHead < 0) return void row.fill(NaN);
      row.set(subtract(rowOf(a.wall!, layer, head), rowOf(b.wall!, other, otherHead)));
    });
  });
  return wall;
}

/** The scale of a map. "all": the same for every map of the wall, so that heads can be compared. */
export function scaleFor(state: State, row: Float32Array, wall: Wall | null, numPrefix: number): Scale {
  const { scale, clip, colours } = state;
  if (typeof scale === "number") return { colours, low: 0, high: scale };
  // Rollout multiplies layers: its numbers are not on the wall.
  const isWhole = scale === "all" && wall !== null && !isRollout(state);
  const high = patchQuantile(isWhole ? wall.values : row, row.length, numPrefix, clip);
  return { colours, low: 0, high };
}

/** Both signs have the same colours' strength. */
export function differenceScale(state: State, row: Float32Array, wall: Wall | null, numPrefix: number): Scale {
  const values = state.scale === "map" || !wall ? row : wall.values;
  const high = typeof state.scale === "number" ? state.scale : patchQuantile(values, row.length, numPrefix, state.clip);
  return { colours: "difference", low: -high, high };
}

/** The number that a fixed scale begins with: where the scale ends now. */
export function scaleToKeep(outcome: { scale: Scale } | null): number {
  return outcome ? Number(outcome.scale.high.toPrecision(3)) : 0.05;
}
