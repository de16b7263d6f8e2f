/** Rows of the sample table that are samples: between the parts of a cache that grew there are rows that are none. */

import type { Cache } from "../cache/types";

export function isRow({ parts }: Cache, row: number): boolean {
  return parts.some(([start, stop]) => row >= start && row < stop);
}

/** The sample after `row`, or before it if `step` is -1; null if there is none. */
export function nextRow(cache: Cache, row: number, step: number): number | null {
  let next = row + step;
  while (next >= 0 && next < cache.numSamples && !isRow(cache, next)) next += step;
  return isRow(cache, next) ? next : null;
}

/** The first samples, at most `limit`. */
export function firstRows(cache: Cache, limit: number): number[] {
  const rows: number[] = [];
  for (let row = nextRow(cache, -1, 1); row !== null && rows.length < limit; row = nextRow(cache, row, 1)) rows.push(row);
  return rows;
}

/** As words: "0 to 15 and 18 to 33". */
export function rowWords({ parts }: Cache): string {
  return parts.map(([start, stop]) => `${start} to ${stop - 1}`).join(" and ");
}
