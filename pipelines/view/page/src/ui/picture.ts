/** One image with a map over it: the view itself, or the clean image with the map carried back. */

import { paintMap, type Scale } from "./colours";
import { pixelCanvas, sharpContext } from "./dom";
import type { Box, Size } from "./geometry";

/** What a picture shows. Coordinates of the view go through `toImage` to those of the image. */
export interface Scene {
  image: CanvasImageSource | null;
  /** The image's size in its own pixels. */
  size: Size;
  view: Size;
  toImage: DOMMatrix;
  grid: [number, number];
  /** One number a patch; null for no map. */
  patches: Float32Array | null;
  scale: Scale;
  opacity: number;
  /** Lines in patches. */
  contour: number[][];
  /** Patches that are queries. */
  queries: number[];
  /** Draw the view's border into the image. */
  hasBorder: boolean;
  /** Boxes of the view where the image's own content is not to be seen. The map is left out there if it is carried back. */
  covered: Box[];
  /** The patch the pointer is on. */
  pointed: number | null;
}

/** Draw a scene into a context whose unit is a pixel of the image times `zoom`. */
export function drawScene(context: CanvasRenderingContext2D, scene: Scene, zoom: number): void {
  const { size, view, grid } = scene;
  context.save();
  context.scale(zoom, zoom);
  context.imageSmoothingQuality = "high";
  if (scene.image) {
    // Under a map the image is grey: every colour that is seen is one of the scale.
    if (scene.patches && scene.opacity > 0) context.filter = "grayscale(1)";
    context.drawImage(scene.image, 0, 0, size.width, size.height);
    context.filter = "none";
  }
  const { a, b, c, d, e, f } = scene.toImage;
  context.transform(a, b, c, d, e, f);
  const [rows, columns] = grid;
  const [patchWidth, patchHeight] = [view.width / columns, view.height / rows];
  context.save();
  clipCovered(context, scene);
  if (scene.patches) drawMap(context, scene);
  context.restore();

  // Lines keep their width on the screen, however the image is stretched.
  const thin = 1 / (zoom * Math.sqrt(Math.abs(a * d - b * c)));
  if (scene.hasBorder) strokeTwice(context, 1.5 * thin, () => context.rect(0, 0, view.width, view.height));
  for (const box of scene.covered) {
    context.setLineDash([5 * thin, 4 * thin]);
    strokeTwice(context, 1.25 * thin, () => context.rect(box.left, box.top, box.width, box.height));
    context.setLineDash([]);
  }
  if (scene.contour.length) {
    strokeTwice(context, 1.75 * thin, () => {
      for (const [x0, y0, x1, y1] of scene.contour) {
        context.moveTo(x0! * patchWidth, y0! * patchHeight);
        context.lineTo(x1! * patchWidth, y1! * patchHeight);
      }
    });
  }
  const box = (patch: number) =>
    context.rect((patch % columns) * patchWidth, Math.floor(patch / columns) * patchHeight, patchWidth, patchHeight);
  for (const patch of scene.queries) strokeTwice(context, 2.5 * thin, () => box(patch));
  if (scene.pointed !== null) strokeTwice(context, 1.25 * thin, () => box(scene.pointed!));
  context.restore();
}

/** Leave out what the view shows of something else; only where the map is carried back to the clean image. */
function clipCovered(context: CanvasRenderingContext2D, { hasBorder, view, covered }: Scene): void {
  if (!hasBorder || !covered.length) return;
  // One by one: what two boxes cover is left out as well.
  for (const box of covered) {
    context.beginPath();
    context.rect(0, 0, view.width, view.height);
    context.rect(box.left, box.top, box.width, box.height);
    context.clip("evenodd");
  }
}

function drawMap(context: CanvasRenderingContext2D, scene: Scene): void {
  const [rows, columns] = scene.grid;
  const [canvas, pixels] = pixelCanvas(columns, rows);
  const image = pixels.createImageData(columns, rows);
  paintMap(new Uint32Array(image.data.buffer), 0, columns, scene.patches!, scene.grid, scene.scale);
  pixels.putImageData(image, 0, 0);
  context.globalAlpha = scene.image ? scene.opacity : 1;
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, 0, 0, scene.view.width, scene.view.height);
  context.globalAlpha = 1;
  markClipped(context, scene);
}

/** A dot on each patch whose number is beyond the scale. */
function markClipped(context: CanvasRenderingContext2D, { patches, grid, view, scale, opacity }: Scene): void {
  if (!opacity) return;
  const [rows, columns] = grid;
  const [width, height] = [view.width / columns, view.height / rows];
  context.fillStyle = "#000";
  context.beginPath();
  patches!.forEach((value, patch) => {
    if (value <= scale.high && value >= scale.low) return;
    const [x, y] = [((patch % columns) + 0.5) * width, (Math.floor(patch / columns) + 0.5) * height];
    const radius = Math.min(width, height) / 7;
    context.moveTo(x + radius, y);
    context.arc(x, y, radius, 0, 2 * Math.PI);
  });
  context.fill();
}

/** White on black: to be seen on every colour. */
function strokeTwice(context: CanvasRenderingContext2D, width: number, path: () => void): void {
  context.beginPath();
  path();
  for (const [colour, factor] of [["#000", 2.2], ["#fff", 1]] as const) {
    context.strokeStyle = colour;
    context.lineWidth = width * factor;
    context.stroke();
  }
}

/** A canvas that shows a scene as wide as its place in the page, and says which patch the pointer is on. */
export class PictureCanvas {
  scene: Scene | null = null;
  private zoom = 1;

  constructor(
    readonly canvas: HTMLCanvasElement,
    private readonly maxHeight: () => number,
  ) {
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement!);
  }

  draw(): void {
    if (!this.scene) return;
    const { size } = this.scene;
    const room = this.canvas.parentElement!.clientWidth;
    this.zoom = Math.min(room / size.width, this.maxHeight() / size.height);
    if (!(this.zoom > 0)) return;
    const [width, height] = [size.width * this.zoom, size.height * this.zoom];
    [this.canvas.style.width, this.canvas.style.height] = [`${width}px`, `${height}px`];
    drawScene(sharpContext(this.canvas, width, height), this.scene, this.zoom);
  }

  /** The patch at a place on the screen; null if the view does not reach there. */
  patchAt(event: MouseEvent): number | null {
    if (!this.scene) return null;
    const { grid, view, toImage } = this.scene;
    const place = this.canvas.getBoundingClientRect();
    const point = new DOMPoint((event.clientX - place.left) / this.zoom, (event.clientY - place.top) / this.zoom);
    const { x, y } = toImage.inverse().transformPoint(point);
    const [row, column] = [Math.floor((y / view.height) * grid[0]), Math.floor((x / view.width) * grid[1])];
    return row >= 0 && column >= 0 && row < grid[0] && column < grid[1] ? row * grid[1] + column : null;
  }
}
