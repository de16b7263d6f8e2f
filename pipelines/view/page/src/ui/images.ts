/** The images of a sample: clean, as a view, and as a thumbnail. From the server if it offers them, else from the
 * cache's stored pixels or from the tars. */

import { siteFile } from "../cache/inlined";
import type { Cache } from "../cache/types";
import { pixelCanvas } from "./dom";
import { isDrawable, viewToSource, type Parameters } from "./geometry";
import type { SiteCache } from "./site";

/** An image and its size in its own pixels, which a canvas of less pixels may stand for. */
export interface Picture {
  canvas: HTMLCanvasElement;
  width: number;
  height: number;
  /** What must be said about it; empty for nothing. */
  note: string;
}

// Nothing on a screen shows more of a photo, and a canvas of 100 megapixels would not fit into a phone.
const LONGEST_SIDE = 1600;

/** The image as it is in the tar, on a canvas whose sides have at most `longest` pixels. The teacher's loader ignores
 * EXIF's orientation, so it is ignored here. */
async function pictureOf(image: Blob | ImageData, longest = LONGEST_SIDE): Promise<Picture> {
  const bitmap = await createImageBitmap(image, { imageOrientation: "none" });
  const { width, height } = bitmap;
  const shrink = Math.min(1, longest / Math.max(width, height));
  const [canvas, context] = pixelCanvas(Math.max(1, Math.round(width * shrink)), Math.max(1, Math.round(height * shrink)));
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return { canvas, width, height, note: "" };
}

/** A file of the site. Throws an Error with the server's sentence if there is none. */
async function fetchBlob(url: string, { signal, priority }: RequestInit = {}): Promise<Blob> {
  if (document.getElementById("inlined")) {
    const carried = await siteFile(url.replace(/\?.*/, ""));
    if (carried) return carried;
    throw new Error("This page does not carry the image.");
  }
  const response = await fetch(url, { signal: signal ?? null, priority: priority ?? "auto" });
  if (response.ok) return response.blob();
  const answer: unknown = await response.json().catch(() => null);
  const sentence = (answer as { error?: unknown } | null)?.error;
  throw new Error(typeof sentence === "string" ? sentence : `The server answers ${response.status} for ${url}.`);
}

/** The clean image.
 *
 * Throws an Error whose message says why there is none. */
export async function cleanPicture(cache: Cache, site: SiteCache, row: number, signal: AbortSignal): Promise<Picture> {
  const blob = site.images ? await fetchBlob(`${site.images}${row}`, { signal }) : await cache.imageBlob(row);
  if (!blob) throw new Error("The tars with the images cannot be reached from here, so there is no clean image.");
  return pictureOf(blob).catch(() => {
    throw new Error("The clean image cannot be decoded by this browser.");
  });
}

/** The view as the teacher saw it; drawn from the clean image where neither the server nor the cache has it. */
export async function viewPicture(
  cache: Cache,
  site: SiteCache,
  { view, row, drawn }: { view: number; row: number; drawn: Parameters },
  clean: Promise<Picture>,
  signal: AbortSignal,
): Promise<Picture> {
  if (site.views) return pictureOf(await fetchBlob(`${site.views}${view}/${row}.png`, { signal }));
  const pixels = await cache.pixels(view, row);
  if (pixels) {
    const [canvas, context] = pixelCanvas(pixels.width, pixels.height);
    context.putImageData(pixels, 0, 0);
    return { canvas, width: pixels.width, height: pixels.height, note: "" };
  }
  return redraw(cache, drawn, await clean);
}

function redraw(cache: Cache, drawn: Parameters, clean: Picture): Picture {
  const { imageWidth: width, imageHeight: height } = cache.policy;
  const [canvas, context] = pixelCanvas(width, height);
  context.imageSmoothingQuality = "high";
  context.setTransform(viewToSource(drawn, { width, height }).inverse());
  context.drawImage(clean.canvas, 0, 0, clean.width, clean.height);
  const left = isDrawable(drawn) ? "" : " Colours, erased boxes and other samples are left out.";
  return { canvas, width, height, note: `Drawn again by this page from the clean image.${left}` };
}

/** A small picture for the strip, of at most `side` pixels a side; null if there is none. */
export async function thumbnail(cache: Cache, site: SiteCache, row: number, side: number): Promise<HTMLCanvasElement | null> {
  try {
    // A server makes it small; a bucket or a file sends all of it.
    const image = site.images
      ? await fetchBlob(`${site.images}${row}?size=${side}`, { priority: "low" })
      : cache.pixelSize
        ? await cache.pixels(0, row)
        : await cache.imageBlob(row);
    return image && (await pictureOf(image, side)).canvas;
  } catch {
    return null; // the tile has the sample's key, and the sample itself says what is wrong
  }
}
