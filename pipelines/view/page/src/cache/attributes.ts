/** What a cache says of itself, checked. Nothing of it is believed before: a wrong member could show other maps. */

import { COMPRESSORS } from "./chunks";
import { CacheError, type CacheErrorKind } from "./types";

export interface Layout {
  numViews: number;
  numSamples: number;
  numLayers: number;
  numTokens: number;
  numComponents: number;
  codesDtype: "int8" | "uint8" | "int16" | "int32";
  samplesPerShard: number;
  layersPerChunk: number;
  parameterNames: string[];
  pixels: [number, number] | null;
  compressor: string;
  /** The row after the last sample of each part; one for a cache in one part. */
  partStops: number[];
  samplesGroup: string;
}

export interface Geometry {
  layers: number[];
  heads: number[];
  numKvHeads: number;
  headDim: number;
  scale: number;
  numPrefix: number;
  gridHeight: number;
  gridWidth: number;
  numTokens: number;
  numQueries: number;
}

export type CodecFields =
  | { name: "exact"; isHalf: boolean }
  | { name: "int8" }
  | { name: "logmap"; bits: number }
  | { name: "transform"; dct: boolean; predict: boolean };

export interface Attributes {
  layout: Layout;
  geometry: Geometry;
  codec: CodecFields;
  isComplete: boolean;
  /** Whether every view of every sample has codes, so that no status needs to be read. */
  hasAllCodes: boolean;
  teacher: { name: string; depth: number; inputHeight: number; inputWidth: number };
  policy: { name: string; imageHeight: number; imageWidth: number; interpolation: string; isMixed: boolean };
}

export const ITEMSIZES = { int8: 1, uint8: 1, int16: 2, int32: 4 };

const MAX_COUNT = 2 ** 31 - 1;
const MAX_CHUNK_NBYTES = 2 ** 30;
const MAX_CHUNKS_PER_SHARD = 2 ** 20; // an index of 16 MiB, kept whole; the store allows 2 ** 24
const MAX_GRID_SIDE = 4096;
const MAX_TOKENS = 2 ** 18;
const GEOMETRY_MEMBERS = (
  "layers heads num_model_heads num_kv_heads head_dim tokens scale kind v_head_dim input_width queries"
).split(" ");
const CODEC_MEMBERS: Record<string, string[]> = {
  exact: ["dtype"],
  int8: [],
  logmap: ["bits"],
  transform: ["dct", "predict", "target_kl", "target_nbytes"],
};

type Members = Record<string, unknown>;

/** Reads members of one JSON object, and says which one is wrong. */
class Reader {
  constructor(
    private readonly file: string,
    private readonly place: string,
    private readonly members: Members,
  ) {}

  fail(name: string, expected: string, kind: CacheErrorKind = "damaged"): never {
    const found = JSON.stringify(this.members[name])?.slice(0, 60) ?? "nothing";
    throw new CacheError(kind, `${this.file}: "${this.place}${name}" is ${found}, expected ${expected}.`);
  }

  object(name: string): Reader {
    const value = this.members[name];
    if (typeof value !== "object" || value === null || Array.isArray(value)) this.fail(name, "an object");
    return new Reader(this.file, `${this.place}${name}.`, value as Members);
  }

  has(name: string): boolean {
    return this.members[name] !== undefined && this.members[name] !== null;
  }

  count(name: string, least = 1, most = MAX_COUNT): number {
    const value = this.members[name];
    if (!isCount(value, least, most)) this.fail(name, `a whole number from ${least} to ${most}`);
    return value;
  }

  optionalCount(name: string): number {
    return this.has(name) ? this.count(name) : 0;
  }

  number(name: string): number {
    const value = this.members[name];
    if (typeof value !== "number" || !(value > 0)) this.fail(name, "a number above 0");
    return value;
  }

  flag(name: string): boolean {
    const value = this.members[name];
    if (typeof value !== "boolean") this.fail(name, "true or false");
    return value;
  }

  text(name: string): string {
    const value = this.members[name];
    if (typeof value !== "string") this.fail(name, "text");
    return value;
  }

  oneOf<Word extends string>(name: string, words: readonly Word[], instead?: Word): Word {
    const value = this.members[name] ?? instead;
    if (!words.includes(value as Word)) this.fail(name, `one of ${words.join(", ")}`);
    return value as Word;
  }

  texts(name: string): string[] {
    const value = this.members[name];
    if (!Array.isArray(value) || value.some((each) => typeof each !== "string")) this.fail(name, "a list of texts");
    return value as string[];
  }

  /** Ascending whole numbers. */
  indices(name: string, least: number): number[] {
    const value = this.members[name];
    const ascends = (each: unknown, at: number, all: unknown[]): boolean =>
      isCount(each, least, MAX_COUNT) && (at === 0 || each > (all[at - 1] as number));
    if (!Array.isArray(value) || value.length === 0 || !value.every(ascends)) {
      this.fail(name, "ascending whole numbers");
    }
    return value as number[];
  }

  pair(name: string): [number, number] {
    const value = this.members[name];
    const isPair = Array.isArray(value) && value.length === 2 && value.every((side) => isCount(side, 1, 2 ** 16));
    if (!isPair) this.fail(name, "[height, width]");
    return value as [number, number];
  }

  onlyMembers(known: string[]): void {
    for (const name of Object.keys(this.members)) {
      if (!known.includes(name)) this.fail(name, "no such member: this page is older than the cache", "unknown-format");
    }
  }
}

function isCount(value: unknown, least: number, most: number): value is number {
  return Number.isInteger(value) && (value as number) >= least && (value as number) <= most;
}

/** `attributes["atcache"]` of a cache's zarr.json, which `file` names. */
export function readAttributes(file: string, members: unknown): Attributes {
  if (typeof members !== "object" || members === null) {
    throw new CacheError("not-a-cache", `${file} is a Zarr group, but not a cache: it has no attributes of atcache.`);
  }
  const root = new Reader(file, "", members as Members);
  if ((members as Members).format !== 1) root.fail("format", "1, the only format this page knows", "unknown-format");
  const codecName = root.object("codec").text("name");
  if (!Object.hasOwn(CODEC_MEMBERS, codecName)) {
    const known = Object.keys(CODEC_MEMBERS).join(", ");
    throw new CacheError("unknown-codec", `${file}: this page does not know the codec "${codecName}", only ${known}.`);
  }
  const codec = readCodec(root.object("codec"), codecName);
  const geometry = readGeometry(root.object("geometry"), codec);
  const layout = readLayout(root.object("layout"));
  checkAgreement(file, layout, geometry, codec);
  const isComplete = root.has("complete");
  const teacher = root.object("teacher");
  const policy = root.object("views").object("policy");
  return {
    layout,
    geometry,
    codec,
    isComplete,
    hasAllCodes:
      isComplete && root.object("complete").count("num_stored", 0) === layout.numViews * numRealSamples(layout),
    teacher: {
      name: teacher.text("name"),
      depth: teacher.count("depth"),
      inputHeight: teacher.object("input").count("height"),
      inputWidth: teacher.object("input").count("width"),
    },
    policy: {
      name: policy.text("name"),
      imageHeight: policy.count("image_height"),
      imageWidth: policy.count("image_width"),
      interpolation: policy.text("interpolation"),
      isMixed: policy.has("mixing"),
    },
  };
}

function readLayout(layout: Reader): Layout {
  const numSamples = layout.count("num_samples");
  const stops = layout.has("part_stops") ? layout.indices("part_stops", 1) : [];
  if (stops.length === 1 || (stops.length && stops.at(-1) !== numSamples)) {
    layout.fail("part_stops", `several rows up to ${numSamples}`);
  }
  const pixels = layout.has("pixels") ? layout.pair("pixels") : null;
  return {
    numViews: layout.count("num_views"),
    numSamples,
    numLayers: layout.count("num_layers", 1, 4096),
    numTokens: layout.count("num_tokens", 1, 2 ** 20),
    numComponents: layout.count("num_components", 1, 2 ** 24),
    codesDtype: layout.oneOf("codes_dtype", ["int8", "uint8", "int16", "int32"]),
    samplesPerShard: layout.count("samples_per_shard"),
    layersPerChunk: layout.count("layers_per_chunk", 1, 4096),
    parameterNames: layout.texts("parameter_names"),
    pixels,
    compressor: layout.oneOf("compressor", Object.keys(COMPRESSORS)),
    partStops: stops.length ? stops : [numSamples],
    samplesGroup: stops.length ? `samples-${stops.length}` : "samples",
  };
}

function readGeometry(geometry: Reader, codec: CodecFields): Geometry {
  geometry.onlyMembers(GEOMETRY_MEMBERS);
  const tokens = geometry.object("tokens");
  tokens.onlyMembers(["num_prefix_tokens", "grid_height", "grid_width"]);
  const numPrefix = tokens.count("num_prefix_tokens", 0, MAX_TOKENS);
  const gridHeight = tokens.count("grid_height", 1, MAX_GRID_SIDE);
  const gridWidth = tokens.count("grid_width", 1, MAX_GRID_SIDE);
  const numTokens = numPrefix + gridHeight * gridWidth;
  if (numTokens > MAX_TOKENS) geometry.fail("tokens", `at most ${MAX_TOKENS} tokens in all`);
  const queries = geometry.oneOf("queries", ["all", "cls", "prefix"], "all");
  if (queries !== "all" && (numPrefix === 0 || codec.name !== "logmap")) {
    geometry.fail("queries", `"all", as there are ${numPrefix} prefix tokens and the codec is ${codec.name}`);
  }
  const heads = geometry.indices("heads", 0);
  const numKvHeads = geometry.count("num_kv_heads");
  if (heads.length % numKvHeads) geometry.fail("num_kv_heads", `a divisor of ${heads.length}, the kept heads`);
  const isMaps = geometry.oneOf("kind", ["factors", "maps"], "factors") === "maps";
  const headDim = geometry.count("head_dim", isMaps ? 0 : 1, isMaps ? 0 : 2 ** 20);
  if (isMaps && codec.name !== "logmap") geometry.fail("kind", `"factors", as the codec is ${codec.name}`);
  geometry.optionalCount("v_head_dim");
  geometry.optionalCount("input_width");
  return {
    layers: geometry.indices("layers", 0),
    heads,
    numKvHeads,
    headDim,
    scale: geometry.number("scale"),
    numPrefix,
    gridHeight,
    gridWidth,
    numTokens,
    numQueries: { all: numTokens, cls: 1, prefix: numPrefix }[queries],
  };
}

function readCodec(codec: Reader, name: string): CodecFields {
  codec.onlyMembers(["name", ...CODEC_MEMBERS[name]]);
  switch (name) {
    case "exact":
      return { name, isHalf: codec.oneOf("dtype", ["float16", "float32"]) === "float16" };
    case "logmap":
      return { name, bits: codec.count("bits", 4, 8) };
    case "transform":
      return { name, dct: codec.flag("dct"), predict: codec.flag("predict") };
    default:
      return { name: "int8" };
  }
}

/** What the layout must be because of geometry and codec. */
function checkAgreement(file: string, layout: Layout, geometry: Geometry, codec: CodecFields): void {
  const { layers, heads, numKvHeads, headDim, numTokens, numQueries } = geometry;
  const numVectors = heads.length + numKvHeads;
  const isTransform = codec.name === "transform";
  const least = {
    exact: numVectors * headDim,
    int8: numVectors * (headDim + 2),
    logmap: heads.length * numTokens,
    transform: 1,
  }[codec.name];
  const dtypes = { int8: "int8", logmap: "uint8", transform: "uint8" };
  const dtype = codec.name === "exact" ? (codec.isHalf ? "int16" : "int32") : dtypes[codec.name];
  const rules: [boolean, string][] = [
    [layout.numLayers === (isTransform ? 2 : layers.length), "num_layers"],
    [layout.numTokens === (isTransform ? 1 : numQueries), "num_tokens"],
    [layout.numLayers % layout.layersPerChunk === 0, "layers_per_chunk"],
    [codec.name === "logmap" ? layout.numComponents === least : layout.numComponents >= least, "num_components"],
    [layout.codesDtype === dtype, "codes_dtype"],
    [
      layout.layersPerChunk * layout.numTokens * layout.numComponents * ITEMSIZES[layout.codesDtype] <=
        MAX_CHUNK_NBYTES,
      "layers_per_chunk",
    ],
  ];
  for (const [holds, name] of rules) {
    if (holds) continue;
    throw new CacheError(
      "damaged",
      `${file}: "layout.${name}" does not fit codec ${codec.name}, ${layers.length} layers, ${heads.length} heads and ` +
        `${numTokens} tokens. Restore the file from a copy.`,
    );
  }
  const numChunks = layout.samplesPerShard * (layout.numLayers / layout.layersPerChunk);
  if (numChunks > MAX_CHUNKS_PER_SHARD) {
    throw new CacheError(
      "too-large",
      `${file}: each shard has ${numChunks} chunks, more than the ${MAX_CHUNKS_PER_SHARD} that this page can read. ` +
        "Look at the cache in Python, or build it with a lower --samples-per-shard.",
    );
  }
}

/** First row, and the row after the last sample, of each part. */
export function parts(layout: Layout): [number, number][] {
  const { partStops, samplesPerShard } = layout;
  return partStops.map((stop, part) => [
    part === 0 ? 0 : Math.ceil(partStops[part - 1] / samplesPerShard) * samplesPerShard,
    stop,
  ]);
}

export function numRealSamples(layout: Layout): number {
  return parts(layout).reduce((sum, [start, stop]) => sum + stop - start, 0);
}
