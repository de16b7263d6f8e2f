/** All that the address says: a link shows the same thing. */

export type Mode = "one" | "mean" | "max" | "rollout" | "rollout-max";
/** Rollouts are of all layers: no layer or head is chosen then. */
export function isRollout({ mode }: Pick<State, "mode">): boolean {
  return mode.startsWith("rollout");
}

export type Sort = "none" | "entropy" | "cls" | "distance";

export interface State {
  /** A name in site.json, or an address. */
  cache: string;
  cache2: string;
  /** "TAR/KEY", or a row. */
  sample: string;
  view: number;
  /** The teacher's indices; -1 before a cache is open. */
  layer: number;
  head: number;
  /** Tokens. */
  query: number[];
  mode: Mode;
  /** One scale for all maps of the wall, one for this map, or a number that stays. */
  scale: "all" | "map" | number;
  /** The quantile of the values that gets the last colour. */
  clip: number;
  opacity: number;
  /** The share of the mass that the contour keeps; 0 for none. */
  contour: number;
  colours: "viridis" | "magma";
  /** What the wall shows if there are two caches. */
  wall: "a" | "b" | "difference";
  pointer: "query" | "values";
  search: string;
  class: string;
  sort: Sort;
  descending: boolean;
}

export const DEFAULTS: State = {
  cache: "",
  cache2: "",
  sample: "",
  view: 0,
  layer: -1,
  head: -1,
  query: [],
  mode: "one",
  scale: "all",
  clip: 0.99,
  opacity: 0.65,
  contour: 0,
  colours: "viridis",
  wall: "a",
  pointer: "query",
  search: "",
  class: "",
  sort: "none",
  descending: true,
};

const CHOICES: Partial<Record<keyof State, readonly string[]>> = {
  mode: ["one", "mean", "max", "rollout", "rollout-max"],
  colours: ["viridis", "magma"],
  wall: ["a", "b", "difference"],
  pointer: ["query", "values"],
  sort: ["none", "entropy", "cls", "distance"],
};

const RANGES: Partial<Record<keyof State, [number, number]>> = { clip: [0.5, 1], opacity: [0, 1], contour: [0, 1] };

/** The state of an address. Members it does not name, or names wrongly, keep their defaults. */
export function parseState(hash: string): State {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  const state: Record<string, unknown> = { ...DEFAULTS };
  for (const [name, fallback] of Object.entries(DEFAULTS) as [keyof State, unknown][]) {
    const text = fields.get(name);
    const value = text === null ? undefined : parseField(name, fallback, text);
    if (value !== undefined) state[name] = value;
  }
  if (fields.has("query") && !fields.has("pointer")) state.pointer = "values"; // a query in a link is meant to stay
  return state as unknown as State;
}

function parseField(name: keyof State, fallback: unknown, text: string): unknown {
  const number = text.trim() === "" ? NaN : Number(text);
  if (name === "query") {
    const tokens = text.split(",").map(Number);
    return tokens.every((token) => Number.isInteger(token) && token >= 0) ? tokens : undefined;
  }
  if (name === "scale") return text === "all" || text === "map" ? text : number > 0 && number < Infinity ? number : undefined;
  if (typeof fallback === "boolean") return text === "1";
  if (typeof fallback === "string") return CHOICES[name]?.includes(text) === false ? undefined : text;
  const [low, high] = RANGES[name] ?? [0, Number.MAX_SAFE_INTEGER];
  if (!(number >= low && number <= high)) return undefined;
  return RANGES[name] || Number.isInteger(number) ? number : undefined;
}

/** The address's part after "#"; what has its default is left out. */
export function formatState(state: State): string {
  const fields: string[] = [];
  for (const [name, value] of Object.entries(state)) {
    const fallback = name === "pointer" && state.query.length ? "values" : DEFAULTS[name as keyof State];
    if (String(value) === String(fallback)) continue;
    const text = typeof value === "boolean" ? (value ? "1" : "0") : String(value);
    // Colons, slashes and commas may stand in a fragment, and links are read by people.
    fields.push(`${name}=${encodeURIComponent(text).replace(/%(2F|3A|2C)/g, decodeURIComponent)}`);
  }
  return fields.join("&");
}
