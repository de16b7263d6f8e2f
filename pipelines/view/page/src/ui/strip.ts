/** The strip of samples: thumbnails, search by key and class, sorting by a statistic. */

import type { Sample } from "../cache/types";
import { make, setText } from "./dom";
import { thumbnail } from "./images";
import type { Lane } from "./lane";
import { firstRows, isRow, nextRow } from "./rows";
import { Sorter, SORT_WORDS, type SortKey } from "./sorting";
import type { State } from "./state";
import { format } from "./values";

// A search or a sort looks at so many samples at most; the strip says so.
const MAX_LISTED = 512;
const BATCH = 32;
const THUMBNAIL_SIDE = 160;

type Asked = Pick<State, "search" | "class" | "sort" | "descending">;

export class Strip {
  readonly list = make("div", { role: "listbox", tabindex: 0, "aria-label": "Samples", class: "tiles", id: "samples" });
  readonly count = make("p", { class: "count", role: "status", id: "samples-count" });
  private readonly sorter: Sorter;
  /** Rows in the order of the list; all rows of the cache if nothing is searched or sorted. Only `restart` sets it. */
  private rows: number[] | null = null;
  private values = new Map<number, number>();
  private asked: Asked | null = null;
  private chosen = -1;
  private numTiles = 0;
  private generation = 0;
  /** Counts how often the list was begun anew: an older fill that still waits must add nothing to it. */
  private filling = 0;
  private readonly seen: IntersectionObserver;
  /** Tiles of the list; those of rows that it does not have any more are dropped. */
  private readonly tileOf = new Map<number, HTMLElement>();
  /** Tiles in sight or near it, which alone have their pictures. */
  private readonly near = new WeakSet<Element>();
  private readonly loading = new WeakSet<Element>();

  constructor(
    private readonly lane: Lane,
    private readonly pick: (row: number) => void,
  ) {
    this.sorter = new Sorter(lane.cache);
    this.list.addEventListener("scroll", () => void this.fill());
    this.list.addEventListener("keydown", (event) => this.onKey(event));
    this.list.addEventListener("click", (event) => {
      const tile = (event.target as Element).closest<HTMLElement>("[data-row]");
      if (tile) this.pick(Number(tile.dataset.row));
    });
    const observe = (entries: IntersectionObserverEntry[]) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) {
          this.near.add(target);
          void this.showThumbnail(target as HTMLElement);
        } else {
          this.near.delete(target);
          target.querySelector(".thumbnail")!.replaceChildren();
        }
      }
    };
    // A screen more on each side: who scrolls a little finds the pictures there.
    this.seen = new IntersectionObserver(observe, { root: this.list, rootMargin: "100%" });
  }

  /** List what is asked for; `key` says by which layer and head to sort. */
  async update(asked: Asked, key: Omit<SortKey, "sort">): Promise<void> {
    const generation = ++this.generation;
    this.sorter.stop();
    const { search, class: className, sort } = asked;
    const isSearched = search.trim() !== "" || className !== "";
    const isNewSearch = this.asked?.search !== search || this.asked.class !== className;
    this.asked = asked;
    const { cache } = this.lane;
    let rows: number[] | null = null;
    if (isSearched) {
      rows = await cache.search(search.trim(), className || undefined, MAX_LISTED);
      if (generation !== this.generation) return;
    } else if (sort !== "none") {
      rows = firstRows(cache, MAX_LISTED);
    }
    if (isNewSearch || sort === "none" || !this.numTiles) this.restart(rows);
    this.describe();
    if (sort !== "none" && rows?.length) await this.sort(generation, rows, { ...key, sort });
  }

  private async sort(generation: number, rows: number[], key: SortKey): Promise<void> {
    setText(this.count, `Sorting: 0 of ${rows.length}`);
    await this.sorter.rank(rows, key, (values, done) => {
      if (generation !== this.generation) return;
      this.values = values;
      const sign = this.asked!.descending ? -1 : 1;
      const ofRow = (row: number) => values.get(row) ?? sign * Infinity;
      const isLast = done === rows.length;
      if (done % 8 === 0 || isLast) this.restart([...rows].sort((a, b) => sign * (ofRow(a) - ofRow(b)) || a - b));
      setText(this.count, isLast ? this.summary() : `Sorting: ${done} of ${rows.length}`);
    });
  }

  private summary(): string {
    const { numRealSamples } = this.lane.cache;
    const noun = numRealSamples === 1 ? "sample" : "samples";
    if (!this.rows) return `${numRealSamples} ${noun}`;
    const isCut = this.rows.length === MAX_LISTED && numRealSamples > MAX_LISTED;
    return `${isCut ? `first ${MAX_LISTED}` : this.rows.length} of ${numRealSamples} ${noun}`;
  }

  private describe(): void {
    setText(this.count, this.rows?.length === 0 ? "No sample has this key and class." : this.summary());
    if (this.asked?.sort === "none") this.values.clear();
  }

  /** Begin the list anew, with these rows. */
  private restart(rows: number[] | null): void {
    this.rows = rows;
    this.filling++;
    this.seen.disconnect();
    const scrolled = this.list.scrollTop;
    const kept = this.numTiles;
    this.list.replaceChildren();
    this.numTiles = 0;
    const listed = rows && new Set(rows);
    for (const row of this.tileOf.keys()) if (listed ? !listed.has(row) : row >= BATCH) this.tileOf.delete(row);
    void this.fill(Math.max(BATCH, this.asked?.sort === "none" ? 0 : kept)).then(() => (this.list.scrollTop = scrolled));
  }

  /** Add tiles until the end of the list is out of sight. */
  private async fill(atLeast = 0): Promise<void> {
    const { filling, list } = this;
    const total = this.rows?.length ?? this.lane.cache.numSamples;
    const isNear = () =>
      list.scrollTop + list.clientHeight * 2 >= list.scrollHeight && list.scrollLeft + list.clientWidth * 2 >= list.scrollWidth;
    while (this.numTiles < total && (this.numTiles < atLeast || isNear())) {
      const start = this.numTiles;
      const stop = (this.numTiles = Math.min(total, start + BATCH));
      const samples = await this.samplesAt(start, stop);
      if (filling !== this.filling) return;
      list.append(...samples.map((sample) => this.tile(sample)));
    }
  }

  private async samplesAt(start: number, stop: number): Promise<Sample[]> {
    if (!this.rows) return (await this.lane.cache.samples(start, stop)).filter(({ row }) => isRow(this.lane.cache, row));
    const rows = this.rows.slice(start, stop);
    return (await Promise.all(rows.map((row) => this.lane.cache.samples(row, row + 1)))).flat();
  }

  private tile(sample: Sample): HTMLElement {
    const value = this.values.get(sample.row);
    const name = sample.key.slice(sample.key.indexOf("/") + 1);
    const note =
      value === undefined
        ? sample.className
        : `${format(value)} ${SORT_WORDS[this.asked!.sort as SortKey["sort"]] ?? ""}`;
    let tile = this.tileOf.get(sample.row);
    if (!tile) {
      tile = make(
        "div",
        { role: "option", id: `sample-${sample.row}`, "data-row": sample.row, class: "tile", title: sample.key },
        make("span", { class: "thumbnail", "aria-hidden": "true" }),
        make("span", { class: "name" }),
        make("span", { class: "note" }),
      );
      this.tileOf.set(sample.row, tile);
    }
    setText(tile.querySelector(".name")!, name);
    setText(tile.querySelector(".note")!, note);
    tile.classList.toggle("missing", !sample.status.includes(1));
    this.mark(tile, sample.row === this.chosen);
    this.seen.observe(tile);
    return tile;
  }

  private async showThumbnail(tile: HTMLElement): Promise<void> {
    if (this.loading.has(tile) || tile.querySelector("canvas")) return;
    this.loading.add(tile);
    const canvas = await thumbnail(this.lane.cache, this.lane.site, Number(tile.dataset.row), THUMBNAIL_SIDE);
    this.loading.delete(tile);
    if (canvas && this.near.has(tile)) tile.querySelector(".thumbnail")!.replaceChildren(canvas);
  }

  private mark(tile: HTMLElement, isChosen: boolean): void {
    tile.setAttribute("aria-selected", String(isChosen));
  }

  choose(row: number): void {
    const before = this.tileOf.get(this.chosen);
    if (before) this.mark(before, false);
    this.chosen = row;
    const tile = this.tileOf.get(row);
    if (!tile?.isConnected) return this.list.removeAttribute("aria-activedescendant");
    this.mark(tile, true);
    this.list.setAttribute("aria-activedescendant", tile.id);
    tile.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** The row after the chosen one in the list, or before it if `step` is -1; null if there is none. */
  neighbour(step: number): number | null {
    if (!this.rows) return nextRow(this.lane.cache, this.chosen, step);
    return this.rows[this.rows.indexOf(this.chosen) + step] ?? null;
  }

  private onKey(event: KeyboardEvent): void {
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const row = this.neighbour(step);
    if (row !== null) this.pick(row);
  }
}
