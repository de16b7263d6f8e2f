/** What page and worker say to each other. */

import type { Policy, Sample, Statistics, Teacher, Tokens, CacheErrorKind } from "./types";

/** What the worker tells of a cache once it is open. */
export interface Description {
  name: string;
  codec: string;
  teacher: Teacher;
  layers: number[];
  heads: number[];
  tokens: Tokens;
  queries: number[];
  numViews: number;
  numSamples: number;
  numRealSamples: number;
  parts: [number, number][];
  complete: boolean;
  classes: string[];
  policy: Policy;
  pixelSize: [number, number] | null;
}

/** Everything that a worker can be asked for, with its arguments and its answer. */
export interface Calls {
  open(url: string, inlined: Map<string, Blob> | null): Description;
  samples(start: number, stop: number): Sample[];
  findSample(key: string): number;
  search(text: string, className: string | undefined, limit: number): number[];
  parameters(view: number, row: number): Record<string, number>;
  pixels(view: number, row: number): Uint8Array<ArrayBuffer> | null;
  imageBlob(row: number): Blob | null;
  prepare(view: number, row: number, first: number): null;
  row(view: number, row: number, layer: number, head: number, queries: number[]): Float32Array;
  wall(view: number, row: number, queries: number[]): Float32Array;
  map(view: number, row: number, layer: number, head: number): Float32Array;
  rollout(view: number, row: number, kind: "mean" | "max", queries: number[]): Float32Array;
  statistics(view: number, row: number): Statistics;
}

/** A call, or the end of one whose answer is not wanted any more. */
export type Request = { id: number; method: keyof Calls; args: unknown[] } | { id: number; method: "cancel" };

export interface Fetched {
  bytes: number;
  requests: number;
}

export type Reply =
  | { id: number; result: unknown; fetched: Fetched }
  | { id: number; error: { kind: CacheErrorKind | null; message: string }; fetched: Fetched }
  | { id: number; layer: number; rows: Float32Array; fetched: Fetched };
