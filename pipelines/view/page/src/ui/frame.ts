/** The page's frame: header, search, panels, messages. It knows where things are, not what they mean. */

import type { CacheErrorKind } from "../cache/types";
import type { Board } from "./board";
import type { Controls } from "./controls";
import { make, setText } from "./dom";
import type { FileKind } from "./export";
import { switchTheme } from "./keys";
import { CAUTION, makeHelp } from "./layout";
import type { Lane } from "./lane";
import type { Sort, State } from "./state";
import type { Strip } from "./strip";
import type { WallView } from "./wallview";
import { describeCache, tokenName } from "./words";

type SearchState = Partial<Pick<State, "search" | "class" | "sort" | "descending">>;

const SORTS: Record<Sort, string> = {
  none: "as stored",
  entropy: "by entropy",
  cls: "by mass on CLS",
  distance: "by distance to the head's mean",
};

/** What may help, for errors where the user can do something that the sentence does not say. */
const ADVICE: Partial<Record<CacheErrorKind, string>> = {
  "no-cors": "The bucket or server must send Access-Control-Allow-Origin for this page's address, or `atcache view` can serve the cache.",
  "no-ranges": "Serve the folder with `atcache view`, or with a server that answers range requests.",
};

export class Frame {
  private readonly about = make("div", { class: "about" });
  private readonly fetched = make("p", { class: "fetched", id: "fetched" });
  private readonly error = make("div", { class: "error", role: "alert", id: "error", hidden: true });
  private readonly said = make("p", { class: "said", role: "status", id: "said" });
  private readonly help = makeHelp();
  private readonly title = make("h2", { id: "sample-name" });
  private readonly asked = make("p", { class: "asked", id: "asked" });
  private readonly samples = make("section", { class: "samples", "aria-label": "Samples" });
  private readonly stage = make("section", { class: "stage", "aria-label": "Sample" });
  private readonly wall = make("section", { class: "wall-panel", "aria-label": "Layers and heads" });
  private readonly main = make("main", { hidden: true }, this.samples, this.stage, this.wall);
  private readonly search = make("input", { type: "search", id: "search", placeholder: "Key", "aria-label": "Search by key" });
  private readonly className = make("select", { id: "class", "aria-label": "Class" });
  private readonly sort = make(
    "select",
    { id: "sort", "aria-label": "Order" },
    ...Object.entries(SORTS).map(([value, word]) => make("option", { value }, word)),
  );
  private readonly direction = make("button", { type: "button", class: "quiet", id: "direction" });

  constructor(save: (kind: FileKind) => void, chooseSave: HTMLSelectElement = makeSave(save)) {
    const button = (label: string, sign: string, onclick: () => void) =>
      make("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick }, sign);
    const header = make(
      "header",
      {},
      make("h1", { class: "wordmark" }, "atcache"),
      this.about,
      this.fetched,
      chooseSave,
      button("Keys and help (?)", "?", () => this.showHelp()),
      button("Light or dark (t)", "◐", () => {
        switchTheme();
        window.dispatchEvent(new Event("resize"));
      }),
    );
    const footer = make("footer", {}, make("p", {}, CAUTION));
    document.body.append(header, this.error, this.main, footer, this.help);
  }

  place(board: Board, controls: Controls, wall: WallView, strip: Strip, { a, b }: { a: Lane; b: Lane | null }): void {
    this.main.hidden = false;
    this.main.classList.toggle("few-heads", a.cache.heads.length <= 8);
    const order = make("div", { class: "row" }, this.sort, this.direction);
    this.samples.replaceChildren(make("div", { class: "finder" }, this.search, this.className, order, strip.count), strip.list);
    this.stage.replaceChildren(
      make("div", { class: "heading" }, this.title, controls.pointer, controls.view),
      make("div", { class: "query-row" }, this.asked, board.prefix),
      board.pictures,
      make("div", { class: "under" }, make("div", { class: "bars" }, board.bar.element, board.differenceBar.element),
        make("div", { class: "numbers" }, board.readout, board.facts, board.comparison, this.said)),
      controls.look,
    );
    this.wall.replaceChildren(controls.maps, wall.place, wall.note);
    if (b) this.wall.insertBefore(controls.wall, wall.place);
  }

  onSearch(change: (changes: SearchState) => void): void {
    let waiting: ReturnType<typeof setTimeout>;
    this.search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => change({ search: this.search.value }), 250);
    });
    this.className.addEventListener("change", () => change({ class: this.className.value }));
    this.sort.addEventListener("change", () => {
      this.direction.hidden = this.sort.value === "none";
      change({ sort: this.sort.value as Sort });
    });
    this.direction.addEventListener("click", () => {
      const descending = this.direction.dataset.descending !== "true";
      this.showDirection(descending);
      change({ descending });
    });
  }

  fillSearch(state: State, classes: string[]): void {
    this.search.value = state.search;
    const options = ["", ...new Set(classes)].map((name) => make("option", { value: name }, name || "all classes"));
    this.className.replaceChildren(...options);
    this.className.value = state.class;
    this.className.hidden = !classes.length;
    this.sort.value = state.sort;
    this.direction.hidden = state.sort === "none";
    this.showDirection(state.descending);
  }

  private showDirection(descending: boolean): void {
    this.direction.dataset.descending = String(descending);
    setText(this.direction, descending ? "↓" : "↑");
    this.direction.setAttribute("aria-label", descending ? "Largest first" : "Smallest first");
  }

  describe(a: Lane, b: Lane | null, query: number[]): void {
    const lanes = [a, b].filter((lane) => lane !== null);
    const text = lanes.map(({ name, cache }) => name + describeCache(cache)).join();
    if (this.about.dataset.text !== text) {
      this.about.dataset.text = text;
      const lines = lanes.map(({ name, cache }, index) =>
        make("p", {}, make("b", {}, (b ? ["A  ", "B  "][index]! : "") + name), make("span", {}, describeCache(cache))),
      );
      this.about.replaceChildren(...lines);
      document.title = `${a.name} · atcache`;
    }
    const sample = a.shown?.sample;
    setText(this.title, sample ? sample.key + (sample.className ? ` · ${sample.className}` : "") : "");
    const names = query.map((token) => tokenName(a.cache.tokens, token));
    setText(this.asked, names.length > 1 ? `Mean of ${names.length} queries: ${names.join("; ")}` : `Query: ${names[0]}`);
  }

  /** Show one sentence where the pictures would be; null takes it away. */
  complain(sentence: string | null, kind: CacheErrorKind | null = null): void {
    this.error.hidden = sentence === null;
    this.main.classList.toggle("failed", sentence !== null);
    if (sentence === null) return;
    const advice = kind && ADVICE[kind];
    this.error.dataset.kind = kind ?? "";
    this.error.replaceChildren(make("p", { class: "sentence" }, sentence));
    if (advice) this.error.append(make("p", {}, advice));
  }

  say(sentence: string): void {
    setText(this.said, sentence);
  }

  busy(isBusy: boolean): void {
    this.stage.setAttribute("aria-busy", String(isBusy));
  }

  sayFetched(words: string, firstPicture_ms: number | undefined): void {
    setText(this.fetched, firstPicture_ms ? `${words} · first picture after ${(firstPicture_ms / 1000).toFixed(2)} s` : words);
  }

  showHelp(): void {
    if (!this.help.open) this.help.showModal();
  }
}

function makeSave(save: (kind: FileKind) => void): HTMLSelectElement {
  const words: [string, string][] = [["", "Save as …"], ["png", "PNG"], ["svg", "SVG"], ["pdf", "PDF"]];
  const select: HTMLSelectElement = make(
    "select",
    {
      "aria-label": "Save the pictures",
      id: "save",
      onchange: () => {
        if (select.value) save(select.value as FileKind);
        select.value = "";
      },
    },
    ...words.map(([value, word]) => make("option", { value }, word)),
  );
  return select;
}
