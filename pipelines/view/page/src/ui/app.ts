/** The page's heart: it holds the state, asks for maps, and has everything drawn. */

import { CacheError, type CacheErrorKind } from "../cache/types";
import { Board, type Outcome } from "./board";
import { makeControls, type Controls } from "./controls";
import { scaleToKeep, queriesFor } from "./derive";
import { setText } from "./dom";
import type { Panel } from "./figure";
import type { Frame } from "./frame";
import { switchTheme, type Action } from "./keys";
import type { Lane } from "./lane";
import { formatState, isRollout, type Mode, type State } from "./state";
import { Strip } from "./strip";
import { describeMaps, formatBytes, tokenName } from "./words";
import { WallView } from "./wallview";

const MODES: Mode[] = ["one", "mean", "max", "rollout", "rollout-max"];

export class App {
  readonly board: Board;
  private readonly controls: Controls;
  private readonly wall: WallView;
  private readonly strip: Strip;
  private outcome: Outcome | null = null;
  /** The token under the pointer, while the pointer picks queries. */
  private hovered: number | null = null;
  private isAsking = false;
  private isStale = false;
  /** Counts what was chosen to be shown: what comes for an earlier choice is dropped. */
  private choice = 0;
  /** What the address named wrongly, until it is said. */
  private readonly wrong: string;
  /** The sample that is shown, or should be: its view may have no maps. */
  private row: number | null = null;
  private isDrawn = true;
  private opacityBefore = 0.65;
  private sortedBy = "";
  private pickedAt: number | null = null;

  constructor(
    public state: State,
    readonly a: Lane,
    readonly b: Lane | null,
    private readonly frame: Frame,
  ) {
    const change = (changes: Partial<State>) => this.change(changes);
    this.board = new Board({
      pick: (token, isAdded) => this.pick(token, isAdded),
      point: (token) => this.point(token),
      asked: () => this.query,
    });
    const scale = () => scaleToKeep(this.outcome);
    this.controls = makeControls(a.cache, change, (what, by) => this.step(what, by), scale);
    this.wall = new WallView((layer, head) => {
      this.change({ layer: a.cache.layers[layer]!, head: a.cache.heads[head]!, mode: "one" });
    });
    this.strip = new Strip(a, (row) => void this.show(row, this.state.view));
    frame.place(this.board, this.controls, this.wall, this.strip, { a, b });
    frame.onSearch((search) => this.change(search));
    this.wrong = this.settle();
  }

  /** Replace what the state does not say yet, or says wrongly, by what the cache has. Returns what was wrong. */
  private settle(): string {
    const { layers, heads, queries, numViews } = this.a.cache;
    const { state } = this;
    const wrong: string[] = [];
    if (!layers.includes(state.layer)) {
      if (state.layer >= 0) wrong.push(`layer ${state.layer}`);
      state.layer = layers.at(-1)!;
    }
    if (!heads.includes(state.head)) {
      if (state.head >= 0) wrong.push(`head ${state.head}`);
      state.head = heads[0]!;
    }
    wrong.push(...state.query.filter((token) => !queries.includes(token)).map((token) => `query ${token}`));
    state.query = state.query.filter((token) => queries.includes(token));
    if (state.view >= numViews) {
      wrong.push(`view ${state.view}`);
      state.view = 0;
    }
    if (!this.b) state.wall = "a";
    return wrong.length ? `The address names what ${this.a.name} does not store: ${wrong.join(", ")}. What is shown instead is in the address now.` : "";
  }

  /** Open what the state names; afterwards the page shows it, or says why not. */
  async start(): Promise<void> {
    this.frame.fillSearch(this.state, this.a.cache.classes);
    try {
      await this.show(await this.a.findRow(this.state.sample), this.state.view);
      if (this.wrong) this.frame.say(this.wrong);
    } catch (error) {
      this.fail(error);
    }
    void this.list();
  }

  /** The query whose maps are shown. */
  private get query(): number[] {
    if (this.hovered !== null) return [this.hovered];
    return this.state.query.length ? this.state.query : [this.a.cache.queries[0]!];
  }

  async show(row: number, view: number): Promise<void> {
    const choice = ++this.choice;
    const isCurrent = () => choice === this.choice;
    this.frame.busy(true);
    this.strip.choose(row);
    this.row = row;
    this.frame.say("");
    try {
      const layer = this.a.cache.layers.indexOf(this.state.layer);
      const changed = () => this.draw();
      const [sample] = await this.a.cache.samples(row, row + 1);
      if (!isCurrent()) return;
      // Written before anything is decoded: also a sample that cannot be shown has its address.
      if (sample) this.remember({ sample: sample.key, view });
      const [isShown] = await Promise.all([
        this.a.show(row, view, layer, changed),
        this.b && sample && this.showOther(this.b, sample.key, view, layer, changed, isCurrent),
      ]);
      if (!isShown || !isCurrent()) return;
      this.frame.complain(null);
      await this.ask();
    } catch (error) {
      if (!isCurrent()) return;
      // What was shown before must not be saved under the address of this one.
      const { shown } = this.a;
      if (shown?.sample.row !== row || shown.view !== view) this.a.empty();
      this.fail(error);
    } finally {
      if (isCurrent()) this.frame.busy(false);
    }
  }

  /** The same sample in B; without it A is still shown. */
  private async showOther(
    b: Lane,
    key: string,
    view: number,
    layer: number,
    changed: () => void,
    isCurrent: () => boolean,
  ): Promise<void> {
    b.empty(); // its search may take long, and it must not stand beside another sample of A
    try {
      const row = await b.cache.findSample(key);
      if (isCurrent()) await b.show(row, view, layer, changed);
    } catch (error) {
      if (!isCurrent()) return;
      if (!(error instanceof CacheError)) throw error;
      b.empty(error.message);
    }
  }

  private remember(changes: Partial<State>): void {
    Object.assign(this.state, changes);
    const hash = `#${formatState(this.state)}`;
    if (hash !== location.hash) history.replaceState(null, "", hash);
  }

  /** Every change of the state comes through here. */
  change(changes: Partial<State>): void {
    const before = { ...this.state };
    this.remember(changes);
    if (this.state.view !== before.view) return void this.show(this.row ?? 0, this.state.view);
    const asks = (state: State) => `${state.query} ${state.mode}`;
    if (asks(this.state) !== asks(before)) void this.ask();
    else this.draw();
    void this.list();
  }

  /** The strip lists again only when what it depends on has changed. */
  private async list(): Promise<void> {
    const { search, class: className, sort, descending, layer, head, view } = this.state;
    const query = this.state.query.length ? this.state.query : this.a.cache.queries.slice(0, 1);
    const place = sort === "none" ? "" : `${layer} ${head} ${view} ${sort === "distance" ? query : ""}`;
    const sortedBy = [search, className, sort, descending, place].join("|");
    if (sortedBy === this.sortedBy) return;
    this.sortedBy = sortedBy;
    const { layers, heads } = this.a.cache;
    const key = { view, layer: layers.indexOf(layer), head: heads.indexOf(head), queries: query };
    try {
      await this.strip.update({ search, class: className, sort, descending }, key);
      if (this.row !== null) this.strip.choose(this.row);
    } catch (error) {
      if ((error as Error).name !== "AbortError") setText(this.strip.count, (error as Error).message);
    }
  }

  private pick(token: number, isAdded: boolean): void {
    if (!this.a.cache.queries.includes(token)) {
      const stored = this.a.cache.queries.map((query) => tokenName(this.a.cache.tokens, query)).join(", ");
      return this.frame.say(`This cache stores the rows of these queries only: ${stored}.`);
    }
    this.pickedAt = performance.now();
    this.hovered = null;
    const { query } = this.state;
    const isThere = query.includes(token);
    const more = isThere ? query.filter((other) => other !== token) : [...query, token];
    this.change({ query: isAdded ? more : [token], pointer: "values" });
  }

  private point(token: number | null): void {
    if (this.state.pointer !== "query") return;
    const hovered = token !== null && this.a.cache.queries.includes(token) ? token : null;
    if (hovered === this.hovered) return;
    this.hovered = hovered;
    void this.ask();
  }

  step(what: "layer" | "head" | "view" | "sample", by: number): void {
    if (what === "sample") {
      const row = this.strip.neighbour(by);
      if (row !== null) void this.show(row, this.state.view);
      return;
    }
    const { layers, heads, numViews } = this.a.cache;
    const values = { layer: layers, head: heads, view: Array.from({ length: numViews }, (_, view) => view) }[what];
    const next = values.indexOf(this.state[what]) + by;
    const value = what === "view" ? values[(next + numViews) % numViews] : values[next];
    if (value === undefined) return;
    this.change(what === "head" ? { head: value, mode: "one" } : { [what]: value });
  }

  act(action: Action): void {
    const { state } = this;
    switch (action.do) {
      case "step":
        return this.step(action.what, action.by);
      case "cls":
        return this.pick(this.a.cache.queries[0]!, false);
      case "mode":
        return this.change({ mode: MODES[(MODES.indexOf(state.mode) + 1) % MODES.length]! });
      case "scale":
        return this.change({ scale: state.scale === "all" ? "map" : state.scale === "map" ? scaleToKeep(this.outcome) : "all" });
      case "overlay":
        if (state.opacity > 0) this.opacityBefore = state.opacity;
        return this.change({ opacity: state.opacity > 0 ? 0 : this.opacityBefore });
      case "wall":
        if (this.b) this.change({ wall: ({ a: "b", b: "difference", difference: "a" } as const)[state.wall] });
        return;
      case "release":
        return this.change({ query: [], pointer: "query" });
      case "theme":
        switchTheme();
        return this.draw();
      case "help":
        return this.frame.showHelp();
    }
  }

  /** Fetch the maps of the query. While one answer is on its way only the last question waits, so that a fast pointer
   * does not pile them up. */
  private async ask(): Promise<void> {
    this.isStale = true;
    if (this.isAsking) return;
    this.isAsking = true;
    while (this.isStale) {
      this.isStale = false;
      const { choice } = this;
      const lanes = [this.a, this.b].filter((lane) => lane !== null);
      // Both to their end, also if one fails: answers to two questions must not come in any order.
      const answers = await Promise.allSettled(lanes.map((lane) => this.askLane(lane)));
      const failed = answers.find((answer) => answer.status === "rejected");
      // Nobody waits any more for the answer to a question before the last one.
      if (failed && !this.isStale && choice === this.choice) this.fail(failed.reason);
      this.draw();
    }
    this.isAsking = false;
  }

  private askLane(lane: Lane): Promise<void> {
    const queries = queriesFor(lane.cache, this.query, this.a.cache.tokens);
    return lane.answer(queries, this.state.mode, () => this.draw());
  }

  /** Draw in the next frame; many calls draw once. */
  draw(): void {
    if (!this.isDrawn) return;
    this.isDrawn = false;
    requestAnimationFrame(() => {
      this.isDrawn = true;
      this.drawNow();
    });
  }

  private drawNow(): void {
    const { state, a, b, query } = this;
    this.controls.update(state);
    this.frame.describe(a, b, query);
    if (!a.shown) return;
    this.outcome = this.board.update({ state, a, b, query });
    this.wall.update({ state, a, b, query }, this.outcome);
    this.measure();
  }

  /** How long the user waited, as performance entries: benchmarks/viewer.py reads them. */
  private measure(): void {
    const { wall, wallQuery } = this.a;
    if (!(this.outcome?.rowA instanceof Float32Array)) return;
    if (!performance.getEntriesByName("first-map").length) performance.mark("first-map");
    if (this.a.viewImage && !performance.getEntriesByName("first-picture").length) performance.mark("first-picture");
    if (this.pickedAt !== null && wall?.ready.every(Boolean) && String(wallQuery) === String(this.query)) {
      performance.measure("click-to-picture", { start: this.pickedAt });
      this.pickedAt = null;
    }
    const { bytes, requests } = [this.a, this.b].reduce(
      (total, lane) => {
        const fetched = lane?.cache.bytesFetched() ?? { bytes: 0, requests: 0 };
        return { bytes: total.bytes + fetched.bytes, requests: total.requests + fetched.requests };
      },
      { bytes: 0, requests: 0 },
    );
    const first = performance.getEntriesByName("first-picture")[0]?.startTime;
    this.frame.sayFetched(`${formatBytes(bytes)} in ${requests} requests`, first);
  }

  /** What a file of the shown pictures needs; null while there are none. */
  figure() {
    const { state, outcome, a, b, query } = this;
    const panels: Panel[] = this.board.panels();
    if (!(outcome?.rowA instanceof Float32Array) || !panels.length || !a.shown?.maps) return null;
    const { cache, shown } = a;
    const lines = [
      `${[a, b].map((lane) => lane?.name).filter(Boolean).join(" and ")} · ${cache.teacher.name} · codec ${cache.codec}`,
      `${describeMaps(state)} · query: ${query.map((token) => tokenName(cache.tokens, token)).join("; ")}`,
      ...this.board.sentences(),
    ];
    if (!this.wall.canvas.hidden) panels.push({ title: this.wall.heading, content: this.wall.canvas });
    const scales = outcome.difference ? [outcome.scale, outcome.differenceScale] : [outcome.scale];
    const name = [shown.sample.key, `view${shown.view}`, isRollout(state) ? "" : `layer${state.layer}`, state.mode === "one" ? `head${state.head}` : state.mode];
    return { title: `${shown.sample.key}, view ${shown.view}`, lines, panels, scales, name: name.filter(Boolean).join("-").replace(/[^\w.-]+/g, "_") };
  }

  private fail(error: unknown): void {
    if ((error as Error).name === "AbortError") return;
    const kind: CacheErrorKind | null = error instanceof CacheError ? error.kind : null;
    this.frame.complain((error as Error).message, kind);
    if (!(error instanceof CacheError)) console.error(error);
    this.draw(); // the header, at least
  }
}
