/** The pictures of the shown sample with their maps, colour bars and numbers. */

import { colourIndex, colourTable, cssColour, type Scale } from "./colours";
import {
  canCompare,
  chosenRow,
  differenceOf,
  differenceScale,
  differenceWall,
  haveSameTokens,
  scaleFor,
  type Difference,
  type Row,
} from "./derive";
import { make, setText } from "./dom";
import { describeView, erasedBox, partnerBox, viewToSource } from "./geometry";
import type { Lane, Loaded } from "./lane";
import { makeColourBar, makeFigure } from "./layout";
import { PictureCanvas, type Scene } from "./picture";
import { isRollout, type State } from "./state";
import { entropy, format, heaviest, outline, percent, sum, type Wall } from "./values";
import { describeMaps, tokenName } from "./words";

export interface Input {
  state: State;
  a: Lane;
  b: Lane | null;
  /** Tokens of A's layout: the query that is shown, which may be the one under the pointer. */
  query: number[];
}

/** What `update` found out, for the wall and for files. */
export interface Outcome {
  rowA: Row;
  rowB: Row;
  difference: Difference | null;
  differenceWall: Wall | null;
  scale: Scale;
  differenceScale: Scale;
}

interface Listener {
  /** A token was clicked, or reached by arrow keys. */
  pick(token: number, isAdded: boolean): void;
  /** The pointer is on a token of the view; null when it leaves. */
  point(token: number | null): void;
  /** The tokens whose maps are asked for. Those that are shown may still be the ones before. */
  asked(): number[];
}

const NAMES = { a: "Stored view", clean: "Clean image, map carried back", b: "B", difference: "A − B" };

export class Board {
  readonly pictures = make("div", { class: "pictures" });
  readonly prefix = make("div", { class: "prefix", role: "group", "aria-label": "Query and attention of tokens without a place" });
  readonly facts = make("p", { class: "facts", id: "facts" });
  readonly comparison = make("p", { class: "facts", id: "comparison", role: "status" });
  readonly readout = make("output", { class: "readout", id: "readout" });
  readonly bar = makeColourBar("bar");
  readonly differenceBar = makeColourBar("difference-bar");
  readonly figures: Record<keyof typeof NAMES, ReturnType<typeof makeFigure> & { picture: PictureCanvas }>;
  private pointed: number | null = null;
  private input: Input | null = null;
  private outcome: Outcome | null = null;

  constructor(private readonly listener: Listener) {
    const limit = () => Math.max(180, window.innerHeight * (this.input?.b ? 0.33 : 0.5));
    const figure = (id: keyof typeof NAMES) => {
      const made = makeFigure(`figure-${id}`, NAMES[id]);
      return { ...made, picture: new PictureCanvas(made.canvas, limit) };
    };
    this.figures = { a: figure("a"), b: figure("b"), difference: figure("difference"), clean: figure("clean") };
    for (const [id, { figure, canvas, place, picture }] of Object.entries(this.figures)) {
      this.pictures.append(figure);
      canvas.addEventListener("pointermove", (event) => this.onPoint(id, picture.patchAt(event)));
      canvas.addEventListener("pointerleave", () => this.onPoint(id, null));
      canvas.addEventListener("click", (event) => {
        const patch = picture.patchAt(event);
        const token = patch === null ? null : this.tokenOf(id, patch);
        if (token !== null) listener.pick(token, event.shiftKey);
      });
      if (id !== "a") continue;
      place.tabIndex = 0;
      place.setAttribute("role", "application");
      place.setAttribute("aria-label", "Query: arrow keys move it by a patch");
      place.addEventListener("keydown", (event) => this.onKey(event));
    }
  }

  /** The token of A that a patch of a figure is; B may have other tokens, which pick nothing. */
  private tokenOf(id: string, patch: number): number | null {
    const { a, b } = this.input!;
    if (id === "b" && !(b && haveSameTokens(a.cache.tokens, b.cache.tokens))) return null;
    return a.cache.tokens.numPrefix + patch;
  }

  private onPoint(id: string, patch: number | null): void {
    if (!this.input) return;
    const token = patch === null ? null : this.tokenOf(id, patch);
    if (token === this.pointed) return;
    this.pointed = token;
    this.read(token);
    this.listener.point(token);
    this.drawPictures();
  }

  private onKey(event: KeyboardEvent): void {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !this.input) return;
    event.preventDefault();
    const { numPrefix, gridHeight, gridWidth } = this.input.a.cache.tokens;
    // Keys may come faster than maps: each goes on from where the one before has led.
    const patch = Math.max(0, (this.listener.asked().at(-1) ?? 0) - numPrefix);
    const clamp = (place: number, length: number) => Math.max(0, Math.min(length - 1, place));
    const row = clamp(Math.floor(patch / gridWidth) + step[0]!, gridHeight);
    const column = clamp((patch % gridWidth) + step[1]!, gridWidth);
    const token = numPrefix + row * gridWidth + column;
    this.pointed = token;
    this.listener.pick(token, event.shiftKey);
  }

  update(input: Input): Outcome {
    this.input = input;
    const { state, a, b } = input;
    const { numPrefix } = a.cache.tokens;
    const rowA = chosenRow(a, state);
    const rowB = b ? chosenRow(b, state) : null;
    const isAlike = b !== null && canCompare(a, b);
    const difference = isAlike ? differenceOf(rowA, rowB) : null;
    const wall = isAlike ? differenceWall(a, b) : null;
    const known = rowA instanceof Float32Array ? rowA : new Float32Array(a.cache.tokens.numTokens);
    this.outcome = {
      rowA,
      rowB,
      difference,
      differenceWall: wall,
      scale: scaleFor(state, known, a.wall, numPrefix),
      differenceScale: differenceScale(state, difference?.row ?? known, wall, numPrefix),
    };
    this.setScenes(input, this.outcome);
    this.drawPictures();
    this.writeNumbers(input, this.outcome);
    this.read(this.pointed);
    return this.outcome;
  }

  private setScenes({ state, a, b, query }: Input, { rowA, rowB, difference, scale, differenceScale }: Outcome): void {
    const { figures } = this;
    const isWide = b !== null;
    this.pictures.classList.toggle("comparing", isWide);
    figures.b.figure.hidden = figures.difference.figure.hidden = !isWide;
    setText(figures.a.title, isWide ? `A: ${a.name}` : "Stored view");
    this.set("a", a.viewImage, viewScene(a, query, rowA, state, scale));
    this.set("clean", a.cleanImage, cleanScene(a, query, rowA, state, scale));
    const words = [a.shown ? describeView(a.shown.drawn) : "", figures.a.note.textContent!];
    setText(figures.a.note, words.filter(Boolean).join(". "));
    if (!b) return;
    setText(figures.b.title, `B: ${b.name}`);
    const own = viewScene(b, query, rowB, state, scale);
    this.set("b", typeof rowB === "string" ? rowB : b.viewImage, { ...own, queries: sameTokens(a, b) ? own.queries : [] });
    const why = sameTokens(a, b) ? "" : "A and B have other tokens, so their maps have no difference.";
    const picture = difference || !why ? a.viewImage : why;
    const row = difference?.row ?? null;
    this.set("difference", picture, viewScene(a, query, row, { ...state, contour: 0 }, differenceScale));
  }

  /** Show a scene, or the sentence in its place: never an empty canvas. */
  private set(id: keyof typeof NAMES, image: Loaded, scene: Omit<Scene, "image">): void {
    const { picture, canvas, note, place } = this.figures[id];
    const isPicture = image !== null && typeof image !== "string";
    setText(note, image === null ? "The image is on its way." : typeof image === "string" ? "" : image.note);
    place.dataset.message = typeof image === "string" ? image : "";
    // Without its image a view still has its map; a clean image has no size then.
    const hasScene = isPicture || (id !== "clean" && scene.patches !== null);
    canvas.hidden = !hasScene;
    picture.scene = hasScene ? { ...scene, size: isPicture ? image : scene.view, image: isPicture ? image.canvas : null } : null;
  }

  private drawPictures(): void {
    const { a } = this.input!;
    for (const { picture } of Object.values(this.figures)) {
      if (!picture.scene) continue;
      picture.scene.pointed = this.pointed === null ? null : this.pointed - a.cache.tokens.numPrefix;
      picture.draw();
    }
  }

  private writeNumbers({ state, a, query }: Input, { rowA, difference, scale, differenceScale }: Outcome): void {
    const { tokens } = a.cache;
    drawBar(this.bar, scale, rowA, tokens.numPrefix, scaleWords(state));
    this.differenceBar.element.hidden = difference === null;
    if (difference) drawBar(this.differenceBar, differenceScale, difference.row, tokens.numPrefix, "A − B, both signs alike");
    this.drawPrefix(a, query, rowA, scale);
    this.compare(difference);
    const { canvas } = this.figures.a;
    if (!(rowA instanceof Float32Array)) return setText(this.facts, rowA ?? "");
    const patches = rowA.subarray(tokens.numPrefix);
    const largest = patches.indexOf(Math.max(...patches)) + tokens.numPrefix;
    const total = sum(rowA);
    const words = [
      state.mode === "max" ? `sum ${format(total)}` : `entropy ${entropy(rowA).toFixed(2)} of ${Math.log2(rowA.length).toFixed(2)} bits`,
      `${percent(sum(patches) / total)} on patches`,
      `most on ${tokenName(tokens, largest)}: ${format(rowA[largest]!)}`,
    ];
    setText(this.facts, words.join(" · "));
    const what = describeMaps(state);
    const asked = query.map((token) => tokenName(tokens, token)).join("; ");
    canvas.setAttribute("aria-label", `Stored view with attention of ${what}, for ${asked}: ${words.join(", ")}`);
  }

  /** Write how far A and B are from each other; nothing of two samples before stays. */
  private compare(difference: Difference | null): void {
    this.comparison.hidden = difference === null;
    if (difference === null) {
      delete this.comparison.dataset.kl;
      return setText(this.comparison, "");
    }
    const { klAB, klBA, totalVariation } = difference;
    const text = `KL(A‖B) ${format(klAB)} nats · KL(B‖A) ${format(klBA)} nats · total variation ${format(totalVariation)}`;
    setText(this.comparison, text);
    this.comparison.dataset.kl = String(klAB);
  }

  private drawPrefix({ cache }: Lane, query: number[], row: Row, scale: Scale): void {
    const { prefixNames } = cache.tokens;
    if (this.prefix.childElementCount !== prefixNames.length) {
      const chip = (name: string, token: number) =>
        make(
          "button",
          { type: "button", class: "chip", onclick: (event: MouseEvent) => this.listener.pick(token, event.shiftKey) },
          make("span", {}, name),
          make("canvas", { width: 1, height: 1, "aria-hidden": "true" }),
          make("span", { class: "number" }),
        );
      this.prefix.replaceChildren(...prefixNames.map(chip));
    }
    [...this.prefix.children].forEach((element, token) => {
      element.setAttribute("aria-pressed", String(query.includes(token)));
      const value = row instanceof Float32Array ? row[token]! : null;
      setText(element.querySelector(".number")!, value === null ? "" : percent(value));
      const context = element.querySelector("canvas")!.getContext("2d")!;
      context.fillStyle = value === null ? "transparent" : cssColour(colourIndex(value, scale), scale.colours);
      context.fillRect(0, 0, 1, 1);
    });
  }

  /** Say a token's numbers. */
  private read(token: number | null): void {
    const { rowA, rowB, difference } = this.outcome ?? {};
    if (token === null || !this.input) return setText(this.readout, "Point at a patch to read its value.");
    const number = (row: Row | undefined) => (row instanceof Float32Array ? row[token]!.toPrecision(6) : "–");
    const name = tokenName(this.input.a.cache.tokens, token);
    const words = difference
      ? `A ${number(rowA)} · B ${number(rowB)} · A − B ${number(difference.row)}`
      : number(rowA);
    setText(this.readout, `${name}: ${words}`);
    this.readout.dataset.token = String(token);
  }

  /** The numbers beside the pictures. */
  sentences(): string[] {
    const shown = this.comparison.hidden ? [this.facts] : [this.facts, this.comparison];
    return shown.map((element) => element.textContent!);
  }

  /** The scenes that are shown, for files. */
  panels(): { title: string; content: Scene }[] {
    return Object.values(this.figures)
      .filter(({ figure, picture }) => !figure.hidden && picture.scene)
      .map(({ title, picture }) => ({ title: title.textContent!, content: picture.scene! }));
  }
}

function sameTokens(a: Lane, b: Lane): boolean {
  return haveSameTokens(a.cache.tokens, b.cache.tokens);
}

function viewScene(lane: Lane, query: number[], row: Row, state: State, scale: Scale): Omit<Scene, "image"> {
  const { tokens, policy } = lane.cache;
  const grid: [number, number] = [tokens.gridHeight, tokens.gridWidth];
  const view = { width: policy.imageWidth, height: policy.imageHeight };
  const patches = row instanceof Float32Array ? row.subarray(tokens.numPrefix) : null;
  return {
    size: view,
    view,
    toImage: new DOMMatrix(),
    grid,
    patches,
    scale,
    opacity: state.opacity,
    contour: patches && state.contour ? outline(heaviest(patches, state.contour), grid) : [],
    queries: query.filter((token) => token >= tokens.numPrefix).map((token) => token - tokens.numPrefix),
    hasBorder: false,
    covered: [],
    pointed: null,
  };
}

function cleanScene(lane: Lane, query: number[], row: Row, state: State, scale: Scale): Omit<Scene, "image"> {
  const scene = viewScene(lane, query, row, state, scale);
  const drawn = lane.shown?.drawn;
  if (!drawn) return scene;
  const covered = [partnerBox(drawn), erasedBox(drawn)].filter((box) => box !== null);
  return { ...scene, toImage: viewToSource(drawn, scene.view), hasBorder: true, covered };
}

function scaleWords(state: State): string {
  if (typeof state.scale === "number") return "Up to a fixed number";
  if (state.scale === "map" || isRollout(state)) return `This map's own scale, to its ${percent(state.clip)} quantile`;
  return `One scale for all maps, to their ${percent(state.clip)} quantile`;
}

function drawBar({ canvas, ticks, text }: Board["bar"], scale: Scale, row: Row, numPrefix: number, words: string): void {
  const context = canvas.getContext("2d")!;
  const image = context.createImageData(256, 1);
  new Uint32Array(image.data.buffer).set(colourTable(scale.colours));
  context.putImageData(image, 0, 0);
  const numbers = [0, 0.25, 0.5, 0.75, 1].map((share) => format(scale.low + share * (scale.high - scale.low)));
  if (ticks.textContent !== numbers.join("")) ticks.replaceChildren(...numbers.map((number) => make("span", {}, number)));
  const patches = row instanceof Float32Array ? row.subarray(numPrefix) : new Float32Array();
  const beyond = patches.reduce((count, value) => count + Number(value > scale.high || value < scale.low), 0);
  const mark = beyond ? ` · ● ${beyond} ${beyond === 1 ? "patch" : "patches"} beyond it` : "";
  setText(text, `${words}: ${format(scale.high)}${mark}`);
}
