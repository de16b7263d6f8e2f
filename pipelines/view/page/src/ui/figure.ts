/** A figure to keep: the pictures side by side, with words and the colour bar. Laid out once as a list of things to draw,
 * which export.ts writes as PNG, SVG or PDF. Sizes are in points. */

import { cssColour, type Scale } from "./colours";
import { pixelCanvas } from "./dom";
import { drawScene, type Scene } from "./picture";
import { format } from "./values";

export type Item =
  | { kind: "image"; x: number; y: number; width: number; height: number; canvas: HTMLCanvasElement }
  | { kind: "rect"; x: number; y: number; width: number; height: number; colour: string }
  | { kind: "text"; x: number; y: number; size: number; text: string; anchor: "start" | "middle" | "end"; isBold: boolean };

export interface Figure {
  width: number;
  height: number;
  items: Item[];
}

export interface Panel {
  title: string;
  /** A scene, or something that is drawn already. */
  content: Scene | HTMLCanvasElement;
}

const MARGIN = 24;
const SIDE = 300;
const GAP = 18;

export function layOutFigure(title: string, lines: string[], panels: Panel[], scales: Scale[]): Figure {
  const items: Item[] = [];
  const write = (text: string, x: number, y: number, size: number, isBold = false, anchor: "start" | "middle" | "end" = "start") =>
    void items.push({ kind: "text", x, y, size, text, anchor, isBold });
  write(title, MARGIN, MARGIN + 12, 13, true);
  lines.forEach((line, index) => write(line, MARGIN, MARGIN + 30 + index * 14, 10));
  const top = MARGIN + 34 + lines.length * 14;
  let x = MARGIN;
  let bottom = top;
  for (const panel of panels) {
    const canvas = panel.content instanceof HTMLCanvasElement ? panel.content : sceneCanvas(panel.content);
    const height = (SIDE * canvas.height) / canvas.width;
    write(panel.title, x, top + 10, 10, true);
    items.push({ kind: "image", x, y: top + 18, width: SIDE, height, canvas });
    bottom = Math.max(bottom, top + 18 + height);
    x += SIDE + GAP;
  }
  let barTop = bottom + 20;
  for (const scale of scales) {
    drawBar(items, scale, barTop);
    barTop += 40;
  }
  return { width: Math.max(x - GAP + MARGIN, 420), height: barTop + MARGIN - 14, items };
}

function sceneCanvas(scene: Scene): HTMLCanvasElement {
  const zoom = (SIDE * 3) / scene.size.width; // sharp in print at 216 dots an inch
  const [canvas, context] = pixelCanvas(SIDE * 3, Math.round(scene.size.height * zoom));
  drawScene(context, { ...scene, pointed: null }, zoom);
  return canvas;
}

const BAR = { steps: 128, width: 256, height: 10 };

function drawBar(items: Item[], scale: Scale, y: number): void {
  for (let step = 0; step < BAR.steps; step++) {
    const width = BAR.width / BAR.steps;
    const colour = cssColour(Math.round((step / (BAR.steps - 1)) * 255), scale.colours);
    // A little wider than its place: viewers show gaps between rectangles that only touch.
    const wide = step < BAR.steps - 1 ? width + 0.5 : width;
    items.push({ kind: "rect", x: MARGIN + step * width, y, width: wide, height: BAR.height, colour });
  }
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    const text = format(scale.low + share * (scale.high - scale.low));
    const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
    items.push({ kind: "text", x: MARGIN + share * BAR.width, y: y + 22, size: 9, text, anchor, isBold: false });
  }
  const what = scale.colours === "difference" ? "difference of attention, A - B" : "attention of a patch; a dot: more than the last colour";
  items.push({ kind: "text", x: MARGIN + BAR.width + 12, y: y + 9, size: 9, text: what, anchor: "start", isBold: false });
}
