/** Everything with which the user changes the state, except the pictures and the strip. */

import type { Cache } from "../cache/types";
import { COLOUR_MAPS } from "./colours";
import { make, setText } from "./dom";
import { makeChoices, makeSelect, makeSlider, makeStepper } from "./layout";
import type { Mode, State } from "./state";
import { percent } from "./values";

const MODES: Record<Mode, string> = {
  one: "One",
  mean: "Mean",
  max: "Max",
  rollout: "Rollout",
  "rollout-max": "Rollout of max",
};

const CLIPS = { "0.95": "95 %", "0.99": "99 %", "0.999": "99.9 %", "1": "100 %" };

export interface Controls {
  view: HTMLElement;
  maps: HTMLElement;
  look: HTMLElement;
  pointer: HTMLElement;
  wall: HTMLElement;
  update(state: State): void;
}

type Change = (changes: Partial<State>) => void;

/** `step` moves through the stored layers, heads and views; `fixedScale` is the number a fixed scale begins with. */
export function makeControls(
  cache: Cache,
  change: Change,
  step: (what: "layer" | "head" | "view", by: number) => void,
  fixedScale: () => number,
): Controls {
  const layer = makeStepper("layer", "Layer", (by) => step("layer", by));
  const head = makeStepper("head", "Head", (by) => step("head", by));
  const view = makeStepper("view", "View", (by) => step("view", by));
  fill(layer.select, cache.layers, (value) => change({ layer: value }));
  fill(head.select, cache.heads, (value) => change({ head: value, mode: "one" }));
  fill(view.select, Array.from({ length: cache.numViews }, (_, index) => index), (value) => change({ view: value }));

  const mode = makeChoices("mode", "Heads", MODES, (value) => change({ mode: value }));
  const scaleWords = { all: "the same for all maps", map: "each map its own", number: "up to a number" };
  const scale = makeSelect("scale", "Scale", scaleWords, (value) => {
    change({ scale: value === "number" ? fixedScale() : value });
  });
  const number: HTMLInputElement = make("input", {
    type: "number",
    min: 0,
    step: "any",
    "aria-label": "Number of the last colour",
    onchange: () => number.valueAsNumber > 0 && change({ scale: number.valueAsNumber }),
  });
  scale.element.append(number);
  const clip = makeSelect("clip", "Last colour at", CLIPS, (value) => change({ clip: Number(value) }));
  clip.element.append(make("span", { class: "hint" }, "of the patches"));
  const colours = makeSelect(
    "colours",
    "Colours",
    Object.fromEntries(COLOUR_MAPS.map((name) => [name, name])) as Record<State["colours"], string>,
    (value) => change({ colours: value }),
  );
  const opacity = makeSlider("opacity", "Opacity", [0, 1, 0.05], (value) => change({ opacity: value }));
  const contour = makeSlider("contour", "Contour", [0, 0.95, 0.05], (value) => change({ contour: value }));
  const pointer = makeChoices("pointer", "Pointer", { query: "picks the query", values: "reads values" }, (value) => {
    change({ pointer: value });
  });
  const wall = makeChoices("wall-of", "Wall", { a: "A", b: "B", difference: "A − B" }, (value) => change({ wall: value }));

  return {
    view: view.element,
    maps: make("div", { class: "controls" }, layer.element, head.element, mode.element),
    look: make(
      "div",
      { class: "controls" },
      scale.element,
      clip.element,
      colours.element,
      opacity.element,
      contour.element,
    ),
    pointer: pointer.element,
    wall: wall.element,
    update(state) {
      layer.select.value = String(state.layer);
      head.select.value = String(state.head);
      view.select.value = String(state.view);
      mode.set(state.mode);
      scale.select.value = typeof state.scale === "number" ? "number" : state.scale;
      number.hidden = typeof state.scale !== "number";
      if (typeof state.scale === "number") number.value = String(state.scale);
      clip.element.hidden = typeof state.scale === "number";
      setClip(clip.select, state.clip);
      colours.select.value = state.colours;
      opacity.input.valueAsNumber = state.opacity;
      setText(opacity.output, percent(state.opacity));
      contour.input.valueAsNumber = state.contour;
      setText(contour.output, state.contour ? `keeps ${percent(state.contour)}` : "off");
      pointer.set(state.pointer);
      wall.set(state.wall);
    },
  };
}

function fill(select: HTMLSelectElement, values: number[], pick: (value: number) => void): void {
  select.replaceChildren(...values.map((value) => make("option", { value }, String(value))));
  select.addEventListener("change", () => pick(Number(select.value)));
}

/** A link may name a quantile that is not in the list. */
function setClip(select: HTMLSelectElement, clip: number): void {
  const value = String(clip);
  if (!(value in CLIPS) && ![...select.options].some((option) => option.value === value)) {
    select.append(make("option", { value }, percent(clip)));
  }
  select.value = value;
}
