/** The page's elements, made once; app.ts fills them. */

import { make } from "./dom";

export const CAUTION =
  "Attention shows where a head reads from, not what the model decides by: a patch with much attention need not " +
  "matter for the output, and one with little may.";

/** One picture with its name, and a note under it that says what is special about it. */
export function makeFigure(id: string, label: string) {
  const canvas = make("canvas", { id: `${id}-canvas`, role: "img", "aria-label": label });
  const title = make("span", { class: "figure-title" }, label);
  const note = make("span", { class: "figure-note" });
  const place = make("div", { class: "picture" }, canvas);
  const figure = make("figure", { id }, make("figcaption", {}, title, " ", note), place);
  return { figure, canvas, title, note, place };
}

/** Buttons around a list: steps by clicks, jumps by choice. */
export function makeStepper(id: string, label: string, step: (by: number) => void) {
  const select = make("select", { id });
  const button = (by: number, word: string, sign: string) =>
    make("button", { type: "button", "aria-label": `${word} ${label.toLowerCase()}`, onclick: () => step(by) }, sign);
  const element = make(
    "div",
    { class: "field" },
    make("label", { for: id }, label),
    make("div", { class: "stepper" }, button(-1, "Previous", "‹"), select, button(1, "Next", "›")),
  );
  return { element, select };
}

/** A few choices beside each other, as radio buttons. */
export function makeChoices<T extends string>(id: string, label: string, words: Record<T, string>, pick: (value: T) => void) {
  const inputs = new Map<string, HTMLInputElement>();
  const options = Object.entries<string>(words).map(([value, word]) => {
    const input = make("input", { type: "radio", name: id, value, onchange: () => pick(value as T) });
    inputs.set(value, input);
    return make("label", {}, input, make("span", {}, word));
  });
  const element = make("fieldset", { class: "field choices", id }, make("legend", {}, label), make("div", {}, ...options));
  const set = (value: T) => void (inputs.get(value)!.checked = true);
  return { element, set };
}

/** A slider with its number. */
export function makeSlider(id: string, label: string, [min, max, step]: [number, number, number], pick: (value: number) => void) {
  const input: HTMLInputElement = make("input", { type: "range", id, min, max, step, oninput: () => pick(input.valueAsNumber) });
  const output = make("output", { for: id });
  const element = make("div", { class: "field slider" }, make("label", { for: id }, label), input, output);
  return { element, input, output };
}

export function makeSelect<T extends string>(id: string, label: string, words: Record<T, string>, pick: (value: T) => void) {
  const options = Object.entries<string>(words).map(([value, word]) => make("option", { value }, word));
  const select: HTMLSelectElement = make("select", { id, onchange: () => pick(select.value as T) }, ...options);
  const element = make("div", { class: "field" }, make("label", { for: id }, label), select);
  return { element, select };
}

const KEYS: [string, string][] = [
  ["← →", "head before, head after"],
  ["↑ ↓", "layer before, layer after"],
  ["n  p", "next sample, previous sample"],
  ["v", "next view"],
  ["c", "CLS as the query, or the first token"],
  ["m", "one head, mean, maximum, rollout"],
  ["s", "one scale for all maps, one for each, or up to the number of now"],
  ["o", "the map on, or off"],
  ["w", "with two caches: the wall of A, of B, of their difference"],
  ["Shift + click", "one more query: the mean is shown"],
  ["Esc", "the pointer picks queries again"],
  ["arrows in the view", "move the query by a patch"],
  ["t", "light, or dark"],
  ["?", "this list"],
];

export function makeHelp(): HTMLDialogElement {
  const rows = KEYS.map(([key, word]) => make("div", {}, make("dt", {}, make("kbd", {}, key)), make("dd", {}, word)));
  const close = make("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const title = make("h2", { id: "help-title" }, "Keys");
  const dialog: HTMLDialogElement = make(
    "dialog",
    { "aria-labelledby": "help-title", id: "help" },
    title,
    make("dl", {}, ...rows),
    make("p", {}, CAUTION),
    close,
  );
  return dialog;
}

/** The colours with their numbers. */
export function makeColourBar(id: string) {
  const canvas = make("canvas", { width: 256, height: 1, "aria-hidden": "true" });
  const ticks = make("div", { class: "ticks" });
  const text = make("p", { class: "scale-text" });
  const element = make("div", { class: "colour-bar", id }, canvas, ticks, text);
  return { element, canvas, ticks, text };
}
