/** The wall's panel: the canvas, and a line that names the map under the pointer. */

import type { Input, Outcome } from "./board";
import type { Scale } from "./colours";
import { haveSameTokens } from "./derive";
import { make, setText } from "./dom";
import { isRollout } from "./state";
import { patchQuantile, rowOf, sum, entropy, divergence, percent, format, type Wall } from "./values";
import { WallCanvas } from "./wall";

const TITLE = "Layers down, heads across";

export class WallView {
  readonly canvas = make("canvas", { id: "wall-canvas", role: "img", "aria-label": "Wall of maps" });
  readonly note = make("p", { class: "facts", id: "wall-note" });
  private readonly title = make("h2", {}, TITLE);
  readonly place = make("div", { class: "wall" }, this.title, this.canvas);
  private readonly wall: WallCanvas;
  /** What is drawn. The lanes may have gone on to another sample by the time the pointer asks for numbers. */
  private last: { input: Input; outcome: Outcome; wall: Wall; walls: [Wall | null, Wall | null] } | null = null;

  constructor(pick: (layer: number, head: number) => void) {
    this.wall = new WallCanvas(this.canvas, () => Math.max(300, window.innerHeight - 245));
    this.canvas.addEventListener("click", (event) => {
      const cell = this.wall.cellAt(event);
      if (cell) pick(...cell);
    });
    this.canvas.addEventListener("pointermove", (event) => this.describe(this.wall.cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.describe(null));
  }

  update(input: Input, outcome: Outcome): void {
    const { state, a, b } = input;
    const isDifference = state.wall === "difference";
    const lane = state.wall === "b" && b ? b : a;
    const wall = isDifference ? outcome.differenceWall : lane.wall;
    this.canvas.hidden = wall === null;
    this.last = wall && { input, outcome, wall, walls: [a.wall, b?.wall ?? null] };
    this.describe(null);
    if (!wall) {
      const isOther = isDifference && b !== null && !haveSameTokens(a.cache.tokens, b.cache.tokens);
      return setText(this.note, isOther ? "A and B have other tokens, so there is no difference." : "");
    }
    const { tokens, layers, heads } = lane.cache;
    const head = state.mode === "one" ? heads.indexOf(state.head) : null;
    this.wall.show({
      wall,
      numPrefix: tokens.numPrefix,
      grid: [tokens.gridHeight, tokens.gridWidth],
      scaleOf: scaleOf(input, outcome, wall, tokens.numPrefix),
      layers,
      heads,
      layer: isRollout(state) ? -1 : layers.indexOf(state.layer),
      head,
    });
    setText(this.title, this.heading);
    const what = isDifference ? "The difference of A and B" : "Attention";
    const size = `${layers.length} layers and ${heads.length} heads`;
    const chosen = isRollout(state) ? "the rollout is of all of them" : `layer ${state.layer} is chosen`;
    this.canvas.setAttribute("aria-label", `${what} in ${size}; ${chosen}. Arrow keys move through it.`);
  }

  /** The wall's title, with its scale if that is not the picture's, whose numbers are elsewhere. */
  get heading(): string {
    if (!this.last) return TITLE;
    const { input, outcome, wall } = this.last;
    const { state, a } = input;
    if (state.scale === "map") return `${TITLE}, each map on its own scale`;
    if (typeof state.scale === "number" || state.wall === "difference" || !isRollout(state)) return TITLE;
    const { high } = scaleOf(input, outcome, wall, a.cache.tokens.numPrefix)(0, 0);
    return `${TITLE}, colours from 0 to ${format(high)}`;
  }

  /** Name one map and its numbers; the chosen one if none is pointed at. */
  private describe(cell: [number, number] | null): void {
    if (!this.last) return;
    const { input, wall, walls } = this.last;
    const { state, a, b } = input;
    const { layers, heads, tokens } = (state.wall === "b" && b ? b : a).cache;
    const [layer, head] = cell ?? [layers.indexOf(state.layer), heads.indexOf(state.head)];
    if (layer < 0 || head < 0 || !wall.ready[layer]) return setText(this.note, "");
    const row = rowOf(wall, layer, head);
    const words = [`layer ${layers[layer]}, head ${heads[head]}`];
    if (state.wall === "difference") {
      const headB = b!.cache.heads.indexOf(heads[head]!);
      if (headB < 0) return setText(this.note, `${words[0]} · not stored in ${b!.name}`);
      const rowB = rowOf(walls[1]!, b!.cache.layers.indexOf(layers[layer]!), headB);
      words.push(`KL(A‖B) ${format(divergence(rowOf(walls[0]!, layer, head), rowB))} nats`);
    } else {
      words.push(`${entropy(row).toFixed(2)} bits`);
      if (tokens.numPrefix) words.push(`${percent(sum(row.subarray(0, tokens.numPrefix)))} not on patches`);
    }
    setText(this.note, words.join(" · "));
  }
}

function scaleOf({ state }: Input, outcome: Outcome, wall: Wall, numPrefix: number): (layer: number, head: number) => Scale {
  const isDifference = state.wall === "difference";
  const whole = (row: Float32Array): Scale => {
    const high = patchQuantile(row, wall.numKeys, numPrefix, state.clip);
    return isDifference ? { colours: "difference", low: -high, high } : { colours: state.colours, low: 0, high };
  };
  if (state.scale === "map") return (layer, head) => whole(rowOf(wall, layer, head));
  if (isDifference) return () => outcome.differenceScale;
  // With rollout the picture has a scale of its own, and the wall still one for all of its maps.
  const scale = typeof state.scale === "number" || !isRollout(state) ? outcome.scale : whole(wall.values);
  return () => scale;
}
