/** Names for people. */

import type { Cache, Tokens } from "../cache/types";
import { isRollout, type Mode, type State } from "./state";

/** "CLS", or "row 3, column 5", counted from 0 as in Python. */
export function tokenName(tokens: Tokens, token: number): string {
  if (token < tokens.numPrefix) return tokens.prefixNames[token] ?? `token ${token}`;
  const patch = token - tokens.numPrefix;
  return `row ${Math.floor(patch / tokens.gridWidth)}, column ${patch % tokens.gridWidth}`;
}

export function formatBytes(nbytes: number): string {
  if (nbytes < 1000) return `${nbytes} B`;
  return nbytes < 999_500 ? `${(nbytes / 1000).toFixed(0)} kB` : `${(nbytes / 1e6).toFixed(1)} MB`;
}

/** What a cache is, in one line. */
export function describeCache({ teacher, codec, layers, heads, tokens, complete }: Cache): string {
  const prefix = tokens.prefixNames.length ? ` + ${summarisePrefix(tokens.prefixNames)}` : "";
  const words = [
    teacher.name,
    `codec ${codec}`,
    `${layers.length} layers × ${heads.length} heads`,
    `${tokens.gridHeight} × ${tokens.gridWidth} patches${prefix}`,
  ];
  if (!complete) words.push("unfinished");
  return words.join(" · ");
}

function summarisePrefix(names: string[]): string {
  const registers = names.filter((name) => name.startsWith("register")).length;
  const others = names.filter((name) => !name.startsWith("register"));
  if (registers) others.push(registers === 1 ? "1 register" : `${registers} registers`);
  return others.join(" + ");
}

const JOINED: Record<Exclude<Mode, "one">, string> = {
  mean: "mean of heads",
  max: "maximum of heads",
  rollout: "rollout through all layers",
  "rollout-max": "rollout of the heads' maxima through all layers",
};

/** Which maps the picture is of. */
export function describeMaps({ layer, head, mode }: State): string {
  if (isRollout({ mode })) return JOINED[mode as "rollout"];
  return `layer ${layer}, ${mode === "one" ? `head ${head}` : JOINED[mode]}`;
}
