/** The wall: the same query in all layers and heads, on one canvas. */

import { paintMap, type Scale } from "./colours";
import { pixelCanvas, sharpContext, styleColour } from "./dom";
import { rowOf, type Wall } from "./values";

export interface WallScene {
  wall: Wall;
  numPrefix: number;
  grid: [number, number];
  /** The scale of a row: the same for all, or one for each map. */
  scaleOf: (layer: number, head: number) => Scale;
  layers: number[];
  heads: number[];
  /** Positions; -1 if all layers are meant. */
  layer: number;
  /** Null if heads are combined: then the whole layer is marked. */
  head: number | null;
}

const GUTTER = { left: 26, top: 18 };
const GAP = 2;

export class WallCanvas {
  private scene: WallScene | null = null;
  private cell = { width: 1, height: 1 };
  private readonly pixels = pixelCanvas(1, 1);

  constructor(
    readonly canvas: HTMLCanvasElement,
    private readonly maxHeight: () => number,
  ) {
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement!);
  }

  show(scene: WallScene): void {
    this.scene = scene;
    this.draw();
  }

  /** The layer and head (positions) at a place on the screen. */
  cellAt(event: MouseEvent): [number, number] | null {
    if (!this.scene) return null;
    const place = this.canvas.getBoundingClientRect();
    const layer = Math.floor((event.clientY - place.top - GUTTER.top) / (this.cell.height + GAP));
    const head = Math.floor((event.clientX - place.left - GUTTER.left) / (this.cell.width + GAP));
    const { numLayers, numHeads } = this.scene.wall;
    return layer >= 0 && head >= 0 && layer < numLayers && head < numHeads ? [layer, head] : null;
  }

  draw(): void {
    const scene = this.scene;
    if (!scene) return;
    const { numLayers, numHeads } = scene.wall;
    const [rows, columns] = scene.grid;
    const room = this.canvas.parentElement!.clientWidth - GUTTER.left;
    const byWidth = room / numHeads - GAP;
    const byHeight = ((this.maxHeight() - GUTTER.top) / numLayers - GAP) * (columns / rows);
    const cellWidth = Math.max(6, Math.floor(Math.min(byWidth, Math.max(byHeight, 22), 96)));
    this.cell = { width: cellWidth, height: Math.max(4, Math.round((cellWidth * rows) / columns)) };
    const width = GUTTER.left + numHeads * (this.cell.width + GAP);
    const height = GUTTER.top + numLayers * (this.cell.height + GAP);
    [this.canvas.style.width, this.canvas.style.height] = [`${width}px`, `${height}px`];
    const context = sharpContext(this.canvas, width, height);
    this.drawLabels(context, scene);
    this.drawMaps(context, scene);
    this.drawChoice(context, scene);
  }

  private place(layer: number, head: number): [number, number] {
    return [GUTTER.left + head * (this.cell.width + GAP), GUTTER.top + layer * (this.cell.height + GAP)];
  }

  private drawMaps(context: CanvasRenderingContext2D, scene: WallScene): void {
    const { wall, numPrefix, grid } = scene;
    const [rows, columns] = grid;
    const [canvas, pixels] = this.pixels;
    [canvas.width, canvas.height] = [columns * wall.numHeads, rows * wall.numLayers];
    const image = pixels.createImageData(canvas.width, canvas.height);
    const words = new Uint32Array(image.data.buffer);
    const place = (layer: number, head: number) => layer * rows * canvas.width + head * columns;
    for (let layer = 0; layer < wall.numLayers; layer++) {
      for (let head = 0; wall.ready[layer] && head < wall.numHeads; head++) {
        const patches = rowOf(wall, layer, head).subarray(numPrefix);
        paintMap(words, place(layer, head), canvas.width, patches, grid, scene.scaleOf(layer, head));
      }
    }
    pixels.putImageData(image, 0, 0);
    // Large cells show patches as squares; in cells smaller than the map, neighbours are averaged instead of dropped.
    context.imageSmoothingEnabled = this.cell.width * window.devicePixelRatio < columns;
    context.imageSmoothingQuality = "medium";
    context.fillStyle = styleColour("--line");
    for (let layer = 0; layer < wall.numLayers; layer++) {
      for (let head = 0; head < wall.numHeads; head++) {
        const [x, y] = this.place(layer, head);
        const { width, height } = this.cell;
        if (!wall.ready[layer] || Number.isNaN(rowOf(wall, layer, head)[0])) context.fillRect(x, y, width, height);
        else context.drawImage(canvas, head * columns, layer * rows, columns, rows, x, y, width, height);
      }
    }
  }

  private drawLabels(context: CanvasRenderingContext2D, scene: WallScene): void {
    context.font = `11px ${styleColour("--font")}`;
    context.textBaseline = "middle";
    const write = (text: number, isChosen: boolean, x: number, y: number) => {
      context.fillStyle = styleColour(isChosen ? "--ink" : "--muted");
      context.fillText(String(text), x, y);
    };
    context.textAlign = "right";
    scene.layers.forEach((layer, position) => {
      write(layer, position === scene.layer, GUTTER.left - 7, this.place(position, 0)[1] + this.cell.height / 2);
    });
    context.textAlign = "center";
    scene.heads.forEach((head, position) => {
      write(head, position === scene.head, this.place(0, position)[0] + this.cell.width / 2, GUTTER.top - 10);
    });
  }

  private drawChoice(context: CanvasRenderingContext2D, scene: WallScene): void {
    if (scene.layer < 0) return;
    const [x, y] = this.place(scene.layer, scene.head ?? 0);
    const cells = scene.head === null ? scene.wall.numHeads : 1;
    const width = cells * (this.cell.width + GAP) - GAP;
    for (const [colour, line] of [[styleColour("--paper"), 4.5], [styleColour("--accent"), 2.5]] as const) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.strokeRect(x, y, width, this.cell.height);
    }
  }
}
