/** What the page knows of a cache: the interface between the decoder (src/cache, src/codecs) and the page (src/ui). */

/** Why a cache cannot be shown. */
export type CacheErrorKind =
  | "not-a-cache" // no zarr.json there, or not one that atcache wrote
  | "no-cors" // the server does not let this page read (a browser cannot tell this from a dead server)
  | "no-ranges" // the server sends whole files where a part was asked for
  | "unknown-format" // a format number, or a member that this page does not know
  | "unknown-codec"
  | "damaged" // a checksum, a size or an attribute is wrong
  | "missing" // a file that the cache must have is not there
  | "network" // the server fails, or cannot be reached
  | "no-such-sample" // no row or key like this
  | "unfinished-sample" // this view is not stored: pending, or its image was bad
  | "too-large"; // more than a browser can hold

/** `message` is one plain sentence for the user. */
export class CacheError extends Error {
  constructor(
    readonly kind: CacheErrorKind,
    message: string,
  ) {
    super(message);
    this.name = "CacheError";
  }
}

export interface Tokens {
  /** CLS and registers, which come before the patches. */
  numPrefix: number;
  gridHeight: number;
  gridWidth: number;
  numTokens: number;
  /** One word for each prefix token: "CLS", "register 1", .... */
  prefixNames: string[];
}

export interface Teacher {
  name: string;
  depth: number;
  inputHeight: number;
  inputWidth: number;
}

export interface Policy {
  name: string;
  imageHeight: number;
  imageWidth: number;
  interpolation: string;
  /** Whether views may show a part of another sample (mixup, CutMix). */
  isMixed: boolean;
}

/** `views/status`, by its number. */
export const STATUS_WORDS: Record<number, string> = {
  0: "pending",
  1: "stored",
  2: "no image",
  3: "no label",
  4: "duplicate key",
  5: "truncated",
  6: "undecodable",
  255: "no sample",
};

export interface Sample {
  row: number;
  /** "TAR/KEY". */
  key: string;
  /** -1 if it has none. */
  label: number;
  /** Empty if it is not known. */
  className: string;
  /** For each view, a number of STATUS_WORDS. */
  status: number[];
}

/** All statistics are means over the stored queries. Axes (layer, head), as positions. (How far a map is from its head's
 * mean depends on which samples are listed: the page sums `map` over them.) */
export interface Statistics {
  /** Bits. */
  entropy: Float32Array;
  /** Attention that goes to the first token; 0 if there are no prefix tokens. */
  clsMass: Float32Array;
}

/** The decoded maps of one view. Layers and heads are positions in `cache.layers` and `cache.heads`, queries and keys
 * are tokens. Rows sum to 1. Every answer is the caller's own array. */
export interface ViewMaps {
  readonly numLayers: number;
  readonly numHeads: number;
  /** Stored rows: `cache.queries.length`. */
  readonly numQueries: number;
  readonly numKeys: number;
  /** (key): the mean of the queries' rows. */
  row(layer: number, head: number, queries: number[]): Promise<Float32Array>;
  /** (layer, head, key): the same for all layers and heads. `onLayer` gets (head, key) of each layer as soon as it is
   * decoded. */
  wall(queries: number[], onLayer?: (layer: number, rows: Float32Array) => void): Promise<Float32Array>;
  /** (query, key), queries as in `cache.queries`. */
  map(layer: number, head: number): Promise<Float32Array>;
  /** (key): attention rollout of Abnar and Zuidema 2020 over all stored layers, heads joined by mean or maximum. Needs
   * the rows of all tokens: refused where the cache stores only some. */
  rollout(kind: "mean" | "max", queries: number[]): Promise<Float32Array>;
  statistics(): Promise<Statistics>;
  /** Decode this layer first. */
  prefetch(layer: number): void;
}

export interface Cache {
  readonly name: string;
  readonly url: string;
  /** "exact", "int8", "logmap" or "transform". */
  readonly codec: string;
  readonly teacher: Teacher;
  /** The teacher's indices of the stored layers and heads. */
  readonly layers: number[];
  readonly heads: number[];
  readonly tokens: Tokens;
  /** Tokens whose rows are stored: all, or the first ones. */
  readonly queries: number[];
  readonly numViews: number;
  /** Rows of the sample table, also those between two parts, which have status 255. */
  readonly numSamples: number;
  /** How many rows are samples. */
  readonly numRealSamples: number;
  /** First row, and the row after the last sample, of each part: a cache that grew has several. */
  readonly parts: [number, number][];
  readonly complete: boolean;
  readonly classes: string[];
  readonly policy: Policy;
  /** [height, width] of the stored views; null if they are not stored. */
  readonly pixelSize: [number, number] | null;

  /** Rows start to stop - 1. */
  samples(start: number, stop: number): Promise<Sample[]>;
  /** The row of "TAR/KEY". */
  findSample(key: string): Promise<number>;
  /** Rows whose key contains `text`, of this class if one is named; stops at `limit`. */
  search(text: string, className: string | undefined, limit: number): Promise<number[]>;
  /** What was drawn for a view, by the names of `layout.parameter_names`. */
  parameters(view: number, row: number): Promise<Record<string, number>>;
  /** The stored view; null if the cache stores none. */
  pixels(view: number, row: number): Promise<ImageData | null>;
  /** The image file from its tar; null if the tar cannot be reached from here. */
  imageBlob(row: number): Promise<Blob | null>;
  /** Starts to decode in the worker, the layer `first` (a position) before all others. A few views stay decoded.
   * `signal` ends it: work that nobody else waits for stops, and the promise rejects with the signal's reason. */
  maps(view: number, row: number, options?: { first?: number; signal?: AbortSignal }): Promise<ViewMaps>;
  /** What was fetched for this cache so far. */
  bytesFetched(): { bytes: number; requests: number };
  /** Ends its worker. */
  close(): void;
}
