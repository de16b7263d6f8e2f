/** Sorting samples by a statistic of one layer and head: worked out one sample after the other, beside what is shown. */

import type { Cache, Statistics } from "../cache/types";
import type { Sort } from "./state";
import { totalVariation } from "./values";

export interface SortKey {
  sort: Exclude<Sort, "none">;
  view: number;
  /** Positions. */
  layer: number;
  head: number;
  queries: number[];
}

/** What the numbers under the thumbnails are. */
export const SORT_WORDS: Record<SortKey["sort"], string> = {
  entropy: "bits",
  cls: "on CLS",
  distance: "from mean",
};

export class Sorter {
  private readonly statistics = new Map<string, Statistics>();
  private running = new AbortController();

  constructor(private readonly cache: Cache) {}

  stop(): void {
    this.running.abort();
  }

  /** The statistic of each row; rows without stored maps are left out. `progress` gets what is known so far.
   *
   * entropy: of a query's row, in bits, mean over the stored queries. cls: the share that goes to CLS, likewise.
   * distance: total variation between the row of the asked-for queries and the mean of these rows over all samples. */
  async rank(rows: number[], key: SortKey, progress: (values: Map<number, number>, done: number) => void): Promise<void> {
    this.running.abort();
    const { signal } = (this.running = new AbortController());
    const values = new Map<number, number>();
    const asked = new Map<number, Float32Array>();
    for (const [index, row] of rows.entries()) {
      if (key.sort === "distance") {
        const maps = await this.mapsOf(row, key, signal);
        if (maps) asked.set(row, await maps.row(key.layer, key.head, key.queries));
      } else {
        const statistics = await this.statisticsOf(row, key, signal);
        const place = key.layer * this.cache.heads.length + key.head;
        if (statistics) values.set(row, (key.sort === "cls" ? statistics.clsMass : statistics.entropy)[place]!);
      }
      if (signal.aborted) return;
      progress(values, index + 1);
    }
    if (key.sort !== "distance") return;
    const mean = new Float32Array(this.cache.tokens.numTokens);
    for (const values of asked.values()) values.forEach((value, token) => (mean[token]! += value / asked.size));
    for (const [row, own] of asked) values.set(row, totalVariation(own, mean));
    progress(values, rows.length);
  }

  private async mapsOf(row: number, { view, layer }: SortKey, signal: AbortSignal) {
    const [sample] = await this.cache.samples(row, row + 1);
    if (sample?.status[view] !== 1 || signal.aborted) return null;
    return this.cache.maps(view, row, { first: layer, signal });
  }

  private async statisticsOf(row: number, key: SortKey, signal: AbortSignal): Promise<Statistics | null> {
    const name = `${key.view}/${row}`;
    const known = this.statistics.get(name);
    if (known) return known;
    const found = (await (await this.mapsOf(row, key, signal))?.statistics()) ?? null;
    if (found) this.statistics.set(name, found);
    return found;
  }
}
