/** One opened cache and what is shown of it: a sample's view, its images, and the wall of the query. */

import { openCache } from "../cache/open";
import type { Cache, Sample, ViewMaps } from "../cache/types";
import { CacheError, STATUS_WORDS } from "../cache/types";
import type { Parameters } from "./geometry";
import { cleanPicture, viewPicture, type Picture } from "./images";
import { isRow, rowWords } from "./rows";
import type { SiteCache } from "./site";
import type { Mode } from "./state";
import type { Wall } from "./values";

export interface Shown {
  sample: Sample;
  view: number;
  drawn: Parameters;
  /** Null while they are on their way. */
  maps: ViewMaps | null;
}

/** A picture, or the sentence that says why there is none. */
export type Loaded = Picture | string | null;

export class Lane {
  shown: Shown | null = null;
  wall: Wall | null = null;
  /** The query that `wall` answers. */
  wallQuery: number[] = [];
  rollout: { mode: Mode; row: Float32Array } | null = null;
  /** Why the query has no maps here; empty if it has. */
  unanswered = "";
  viewImage: Loaded = null;
  cleanImage: Loaded = null;
  private loading = new AbortController();

  private constructor(
    readonly cache: Cache,
    readonly site: SiteCache,
  ) {}

  /** What the user calls it; its address may be only a number. */
  get name(): string {
    return this.site.name.replace(/\/+$/, "").split("/").at(-1) || this.cache.name;
  }

  static async open(site: SiteCache): Promise<Lane> {
    return new Lane(await openCache(site.root), site);
  }

  /** Show another view. Calls `changed` as soon as each of its parts is there; a later call of `show` ends this one.
   *
   * Throws CacheError: there is no such view, or it is not stored. */
  async show(row: number, view: number, first: number, changed: () => void): Promise<boolean> {
    this.loading.abort();
    const { signal } = (this.loading = new AbortController());
    const { cache, site } = this;
    const [sample] = await cache.samples(row, row + 1);
    if (signal.aborted || !sample) return false;
    // First of all: nothing else of a view that is not stored can be read.
    if (sample.status[view] !== 1) throw unfinished(sample, view);
    const drawn = await cache.parameters(view, row);
    if (signal.aborted) return false;
    this.clear();
    // The sample before ends here: its maps must never lie over this one's image.
    const shown = (this.shown = { sample, view, drawn, maps: null });
    const clean = cleanPicture(cache, site, row, signal);
    const whole = viewPicture(cache, site, { view, row, drawn }, clean, signal);
    const keep = async (name: "cleanImage" | "viewImage", picture: Promise<Picture>) => {
      const loaded = await picture.catch((error: Error) => error.message);
      if (signal.aborted) return;
      this[name] = loaded;
      changed();
    };
    void keep("cleanImage", clean);
    void keep("viewImage", whole);
    const maps = await cache.maps(view, row, { first, signal });
    if (signal.aborted) return false;
    this.shown = { ...shown, maps };
    return true;
  }

  /** Show nothing, with the reason in the picture's place; without one, another view is on its way. */
  empty(reason: string | null = null): void {
    this.loading.abort();
    this.clear();
    this.shown = null;
    this.viewImage = reason;
  }

  private clear(): void {
    this.viewImage = this.cleanImage = null;
    this.forget("");
  }

  /** Have no maps, because of `why`. */
  private forget(why: string): void {
    this.wall = this.rollout = null;
    this.wallQuery = [];
    this.unanswered = why;
  }

  /** Fetch what a mode shows of a query. */
  async answer(queries: number[], mode: Mode, changed: () => void): Promise<void> {
    if (!queries.length) return this.forget(`${this.name} does not store the rows of this query.`);
    await this.ask(queries, changed);
    this.rollout = null;
    if (mode === "rollout" || mode === "rollout-max") await this.askRollout(mode, queries);
  }

  /** Fetch the wall for a query. The one before stays until the first layer of this one is there. */
  private async ask(queries: number[], changed: () => void): Promise<void> {
    const shown = this.shown;
    if (!shown?.maps) return;
    const { numLayers, numHeads, numKeys } = shown.maps;
    const wall: Wall = {
      values: new Float32Array(numLayers * numHeads * numKeys),
      numLayers,
      numHeads,
      numKeys,
      ready: new Array<boolean>(numLayers).fill(false),
    };
    const isNew = this.wall === null;
    // Layers are shown one by one only where nothing is shown yet; a moving pointer gets whole walls.
    const onLayer = (layer: number, rows: Float32Array) => {
      wall.values.set(rows, layer * numHeads * numKeys);
      wall.ready[layer] = true;
      if (this.shown !== shown) return;
      [this.wall, this.wallQuery, this.unanswered] = [wall, queries, ""];
      changed();
    };
    const values = await shown.maps.wall(queries, isNew ? onLayer : undefined);
    if (this.shown !== shown) return;
    this.wall = { ...wall, values, ready: wall.ready.fill(true) };
    [this.wallQuery, this.unanswered] = [queries, ""];
  }

  private async askRollout(mode: "rollout" | "rollout-max", queries: number[]): Promise<void> {
    const shown = this.shown;
    const row = await shown?.maps?.rollout(mode === "rollout" ? "mean" : "max", queries);
    if (row && this.shown === shown) this.rollout = { mode, row };
  }

  /** The row that the address names, by key or number. */
  async findRow(name: string): Promise<number> {
    if (name === "") return this.firstRow();
    if (!/^\d+$/.test(name)) return this.cache.findSample(name);
    if (isRow(this.cache, Number(name))) return Number(name);
    const words = `There is no sample ${name} in ${this.name}: its rows are ${rowWords(this.cache)}.`;
    throw new CacheError("no-such-sample", words);
  }

  /** The first sample with a stored view: a cache may begin with bad images. */
  private async firstRow(): Promise<number> {
    const start = await this.cache.samples(0, Math.min(64, this.cache.numSamples));
    return start.find((sample) => sample.status.includes(1))?.row ?? 0;
  }
}

function unfinished(sample: Sample, view: number): CacheError {
  const word = STATUS_WORDS[sample.status[view] ?? 0] ?? "unknown";
  const why = word === "pending" ? "the build has not come to it yet" : `its status is "${word}"`;
  return new CacheError("unfinished-sample", `View ${view} of ${sample.key} has no stored attention: ${why}.`);
}
