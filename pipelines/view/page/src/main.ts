/** Starts the page: which caches, then the app. */

import "./style.css";
import { openCache } from "./cache/open";
import { CacheError } from "./cache/types";
import { App } from "./ui/app";
import { download, writeFigure, type FileKind } from "./ui/export";
import { layOutFigure } from "./ui/figure";
import { Frame } from "./ui/frame";
import { listenToKeys, restoreTheme } from "./ui/keys";
import { Lane } from "./ui/lane";
import { chooseCaches, readSite } from "./ui/site";
import { parseState } from "./ui/state";

// For the browser's console: `await atcache.openCache(address)` reads a cache as src/cache/types.ts says.
Object.assign(globalThis, { atcache: { openCache } });
restoreTheme();
let app: App | null = null;

const frame = new Frame((kind) => void save(kind));

async function start(): Promise<void> {
  try {
    const state = parseState(location.hash);
    const chosen = chooseCaches(state, await readSite());
    if (!chosen.length) {
      throw new CacheError("not-a-cache", "This page needs a cache: write #cache=ADDRESS/OF/CACHE.zarr behind its address.");
    }
    const [a, b] = await Promise.all(chosen.map((cache) => Lane.open(cache)));
    [state.cache, state.cache2] = [chosen[0]!.name, chosen[1]?.name ?? ""];
    app = new App(state, a!, b ?? null, frame);
    await app.start();
  } catch (error) {
    frame.complain((error as Error).message, error instanceof CacheError ? error.kind : null);
    if (!(error instanceof CacheError)) console.error(error);
  }
}

/** The pictures that are shown, as a file. */
async function save(kind: FileKind): Promise<void> {
  const figure = app?.figure();
  if (!figure) return frame.say("There is no picture to save yet.");
  const { title, lines, panels, scales, name } = figure;
  try {
    download(await writeFigure(layOutFigure(title, lines, panels, scales), kind), `${name}.${kind}`);
  } catch (error) {
    frame.say((error as Error).message);
  }
}

listenToKeys((action) => app?.act(action));
window.addEventListener("resize", () => app?.draw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => app?.draw());
// An address that was typed, or a link into this same page. What the page writes itself makes no such event.
window.addEventListener("hashchange", () => location.reload());
void start();
