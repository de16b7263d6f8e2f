/** `openCache`: a cache as the page sees it. All work is done in a worker. */

import { inlinedFiles } from "./inlined";
import type { Calls, Description, Fetched, Reply, Request } from "./messages";
import { CacheError, type Cache, type Statistics, type ViewMaps } from "./types";
import CacheWorker from "./worker?worker&inline";

interface Waiting {
  resolve(result: unknown): void;
  reject(error: unknown): void;
  onLayer?: (layer: number, rows: Float32Array) => void;
}

/** Asks a worker, and counts what it fetched. */
class Remote {
  fetched: Fetched = { bytes: 0, requests: 0 };
  private readonly worker = new CacheWorker();
  private readonly waiting = new Map<number, Waiting>();
  private lastId = 0;

  constructor() {
    this.worker.onmessage = ({ data }: MessageEvent<Reply>) => this.receive(data);
    this.worker.onerror = (event) => {
      for (const { reject } of this.waiting.values()) reject(new Error(`The decoder failed: ${event.message}`));
      this.waiting.clear();
    };
  }

  call<Method extends keyof Calls>(
    method: Method,
    args: Parameters<Calls[Method]>,
    { onLayer, signal }: { onLayer?: Waiting["onLayer"]; signal?: AbortSignal } = {},
  ): Promise<ReturnType<Calls[Method]>> {
    const id = ++this.lastId;
    return new Promise((resolve, reject) => {
      signal?.throwIfAborted();
      signal?.addEventListener("abort", () => this.cancel(id, signal.reason), { once: true });
      this.waiting.set(id, { resolve: resolve as Waiting["resolve"], reject, onLayer });
      this.post({ id, method, args });
    });
  }

  private cancel(id: number, reason: unknown): void {
    const waiting = this.waiting.get(id);
    if (waiting === undefined) return;
    this.waiting.delete(id);
    waiting.reject(reason);
    this.post({ id, method: "cancel" });
  }

  private post(request: Request): void {
    this.worker.postMessage(request);
  }

  close(): void {
    this.worker.terminate();
    for (const { reject } of this.waiting.values()) reject(new DOMException("the cache was closed", "AbortError"));
    this.waiting.clear();
  }

  private receive(reply: Reply): void {
    this.fetched = reply.fetched;
    const waiting = this.waiting.get(reply.id);
    if (waiting === undefined) return;
    if ("layer" in reply) {
      waiting.onLayer?.(reply.layer, reply.rows);
      return;
    }
    this.waiting.delete(reply.id);
    if ("result" in reply) waiting.resolve(reply.result);
    else waiting.reject(asError(reply.error));
  }
}

function asError({ kind, message }: { kind: CacheError["kind"] | null; message: string }): Error {
  return kind === null ? new Error(message) : new CacheError(kind, message);
}

class OpenCache implements Cache {
  readonly name!: string;
  readonly codec!: string;
  readonly teacher!: Description["teacher"];
  readonly layers!: number[];
  readonly heads!: number[];
  readonly tokens!: Description["tokens"];
  readonly queries!: number[];
  readonly numViews!: number;
  readonly numSamples!: number;
  readonly numRealSamples!: number;
  readonly parts!: [number, number][];
  readonly complete!: boolean;
  readonly classes!: string[];
  readonly policy!: Description["policy"];
  readonly pixelSize!: [number, number] | null;

  constructor(
    readonly url: string,
    private readonly remote: Remote,
    description: Description,
  ) {
    Object.assign(this, description);
  }

  samples: Cache["samples"] = (start, stop) => this.remote.call("samples", [start, stop]);
  findSample: Cache["findSample"] = (key) => this.remote.call("findSample", [key]);
  search: Cache["search"] = (text, className, limit) => this.remote.call("search", [text, className, limit]);
  parameters: Cache["parameters"] = (view, row) => this.remote.call("parameters", [view, row]);
  imageBlob: Cache["imageBlob"] = (row) => this.remote.call("imageBlob", [row]);

  async pixels(view: number, row: number): Promise<ImageData | null> {
    const rgb = this.pixelSize && (await this.remote.call("pixels", [view, row]));
    if (rgb === null || this.pixelSize === null) return null;
    const [height, width] = this.pixelSize;
    const image = new ImageData(width, height);
    for (let from = 0, to = 0; from < rgb.length; from += 3, to += 4) {
      image.data.set(rgb.subarray(from, from + 3), to);
      image.data[to + 3] = 255;
    }
    return image;
  }

  async maps(
    view: number,
    row: number,
    { first = 0, signal }: { first?: number; signal?: AbortSignal } = {},
  ): Promise<ViewMaps> {
    await this.remote.call("prepare", [view, row, first], { signal });
    return new RemoteMaps(this, this.remote, view, row);
  }

  bytesFetched(): Fetched {
    return { ...this.remote.fetched };
  }

  close(): void {
    this.remote.close();
  }
}

class RemoteMaps implements ViewMaps {
  readonly numLayers: number;
  readonly numHeads: number;
  readonly numQueries: number;
  readonly numKeys: number;

  constructor(
    cache: Cache,
    private readonly remote: Remote,
    private readonly view: number,
    private readonly sample: number,
  ) {
    this.numLayers = cache.layers.length;
    this.numHeads = cache.heads.length;
    this.numQueries = cache.queries.length;
    this.numKeys = cache.tokens.numTokens;
  }

  row(layer: number, head: number, queries: number[]): Promise<Float32Array> {
    return this.remote.call("row", [this.view, this.sample, layer, head, queries]);
  }

  wall(queries: number[], onLayer?: (layer: number, rows: Float32Array) => void): Promise<Float32Array> {
    return this.remote.call("wall", [this.view, this.sample, queries], { onLayer });
  }

  map(layer: number, head: number): Promise<Float32Array> {
    return this.remote.call("map", [this.view, this.sample, layer, head]);
  }

  rollout(kind: "mean" | "max", queries: number[]): Promise<Float32Array> {
    return this.remote.call("rollout", [this.view, this.sample, kind, queries]);
  }

  statistics(): Promise<Statistics> {
    return this.remote.call("statistics", [this.view, this.sample]);
  }

  prefetch(layer: number): void {
    this.remote.call("prepare", [this.view, this.sample, layer]).catch(() => {}); // whoever asks gets the error
  }
}

/** Open the cache at a URL (relative ones are relative to the page).
 *
 * Throws CacheError: there is no cache, or it cannot be shown; `kind` and the sentence say why.
 */
export async function openCache(url: string): Promise<Cache> {
  let place: string;
  try {
    place = new URL(`${url.replace(/\/+$/, "")}/`, document.baseURI).href;
  } catch {
    throw new CacheError("not-a-cache", `"${url}" is not an address.`);
  }
  const remote = new Remote();
  try {
    return new OpenCache(place, remote, await remote.call("open", [place, inlinedFiles(url)]));
  } catch (error) {
    remote.close();
    throw error;
  }
}

// For the browser's console, and for tests: `cache = await atcache.openCache("caches/0/")`.
Object.assign(globalThis, { atcache: { openCache } });
