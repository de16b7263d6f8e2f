/** The worker of one cache: fetches and decodes, so that the page never waits. */

import { numRealSamples, parts } from "./attributes";
import { ViewDecoder } from "./decoding";
import { BlobFiles, WebFiles, type Files } from "./files";
import type { Calls, Description, Reply, Request } from "./messages";
import { CacheReader } from "./reader";
import { CacheError } from "./types";
import type { Task } from "./view";

let files: Files | null = null;
let opened: { reader: CacheReader; decoder: ViewDecoder } | null = null;

async function open(url: string, inlined: Map<string, Blob> | null): Promise<Description> {
  files = inlined === null ? new WebFiles(url) : new BlobFiles(url, inlined);
  const reader = await CacheReader.open(files);
  const decoder = new ViewDecoder(reader);
  opened = { reader, decoder };
  decoder.prepare().catch(() => {}); // whoever shows a map gets the error
  return describe(reader, url);
}

function describe(reader: CacheReader, url: string): Description {
  const { layout, geometry, codec, teacher, policy, isComplete } = reader.attributes;
  const { layers, heads, numPrefix, gridHeight, gridWidth, numTokens, numQueries } = geometry;
  return {
    name: lastFolder(url),
    codec: codec.name,
    teacher,
    layers,
    heads,
    tokens: { numPrefix, gridHeight, gridWidth, numTokens, prefixNames: prefixNames(teacher.name, numPrefix) },
    queries: Array.from({ length: numQueries }, (_, query) => query),
    numViews: layout.numViews,
    numSamples: layout.numSamples,
    numRealSamples: numRealSamples(layout),
    parts: parts(layout),
    complete: isComplete,
    classes: reader.table.classes,
    policy,
    pixelSize: layout.pixels,
  };
}

function lastFolder(url: string): string {
  const name = url.replace(/\/+$/, "").split("/").pop()!;
  try {
    return decodeURIComponent(name);
  } catch {
    return name; // a lone % is a letter like any other
  }
}

/** A cache does not say what its prefix tokens are. A class token comes first, then a distillation token or registers;
 * timm's models that pool patches beside registers ("reg4_gap") have no class token. */
function prefixNames(teacher: string, numPrefix: number): string[] {
  const hasClass = !/reg\d+_gap/.test(teacher);
  return Array.from({ length: numPrefix }, (_, token) => {
    if (token === 0 && hasClass) return "CLS";
    if (token === 1 && numPrefix === 2 && teacher.includes("distilled")) return "distillation";
    return `register ${token + (hasClass ? 0 : 1)}`;
  });
}

type Answer<Method extends keyof Calls> = ReturnType<Calls[Method]>;
interface Call extends Task {
  id: number;
}
type Handlers = {
  [Method in keyof Calls]: (call: Call, ...args: Parameters<Calls[Method]>) => Promise<Answer<Method>>;
};

const running = new Map<number, Call>();

function get(): { reader: CacheReader; decoder: ViewDecoder } {
  if (opened === null) throw new Error("no cache is open");
  return opened;
}

const handlers: Handlers = {
  open: (_, url, inlined) => open(url, inlined),
  samples: (_, start, stop) => get().reader.samples(start, stop),
  findSample: (_, key) => get().reader.table.find(key),
  search: (_, text, className, limit) => get().reader.table.search(text, className, limit),
  parameters: (_, view, row) => get().reader.readParameters(view, row),
  pixels: (_, view, row) => get().reader.readPixels(view, row),
  imageBlob: (_, row) => get().reader.imageBlob(row),
  prepare: async (call, view, row, first) => {
    const decoded = get().decoder.view(view, row);
    decoded.prefer(first);
    await decoded.layer(first, call);
    return null;
  },
  row: (_, view, row, layer, head, queries) => get().decoder.view(view, row).row(layer, head, queries),
  wall: ({ id }, view, row, queries) => {
    const onLayer = (layer: number, rows: Float32Array): void => send({ id, layer, rows, fetched: fetched() });
    return get().decoder.view(view, row).wall(queries, onLayer);
  },
  map: (_, view, row, layer, head) => get().decoder.view(view, row).map(layer, head),
  rollout: (_, view, row, kind, queries) => get().decoder.view(view, row).rollout(kind, queries),
  statistics: (_, view, row) =>
    get().decoder.view(view, row).statistics(get().reader.attributes.geometry.numPrefix),
};

function fetched(): { bytes: number; requests: number } {
  return { ...(files?.fetched ?? { bytes: 0, requests: 0 }) };
}

function send(reply: Reply): void {
  postMessage(reply);
}

onmessage = async ({ data }: MessageEvent<Request>): Promise<void> => {
  const { id } = data;
  if (data.method === "cancel") {
    const call = running.get(id);
    if (call) call.isCancelled = true;
    return;
  }
  const call = { id, isCancelled: false };
  running.set(id, call);
  try {
    const handler = handlers[data.method] as (call: Call, ...args: unknown[]) => Promise<unknown>;
    send({ id, result: await handler(call, ...data.args), fetched: fetched() });
  } catch (error) {
    const kind = error instanceof CacheError ? error.kind : null;
    send({ id, error: { kind, message: (error as Error).message }, fetched: fetched() });
  } finally {
    running.delete(id);
  }
};
