/** A cache, open for reading, inside the worker: everything but the maps. */

import { Metadata, parseObject, readSmallShard, Shards, type Chunk, type ShardedArray } from "./arrays";
import { ITEMSIZES, parts, readAttributes, type Attributes } from "./attributes";
import { COMPRESSORS, untranspose } from "./chunks";
import { damaged, missing, WebFiles, type Files } from "./files";
import { Kept } from "./kept";
import { NO_SAMPLE, SampleTable } from "./samples";
import { readBias, readState } from "./state";
import type { StateArray } from "../codecs/state";
import { CacheError, STATUS_WORDS, type Sample } from "./types";

const MAX_ROOT_NBYTES = 2 ** 26; // the names of very many tars and classes are in it
const MAX_IMAGE_NBYTES = 2 ** 28;
const KEPT_BLOCKS = 256;
const PENDING = 0;
const STORED = 1;

export class CacheReader {
  private readonly codes: Shards;
  private readonly rgb: Shards | null;
  private readonly blocks = new Kept<string, Uint8Array<ArrayBuffer> | null>(KEPT_BLOCKS);

  private constructor(
    readonly files: Files,
    readonly attributes: Attributes,
    private readonly metadata: Metadata,
    readonly table: SampleTable,
  ) {
    const { layout } = attributes;
    const tokenNbytes = layout.numComponents * ITEMSIZES[layout.codesDtype];
    this.codes = new Shards(files, {
      name: "attention/codes",
      numAxes: 5,
      numChunks: layout.samplesPerShard * this.chunksPerSample,
      chunkNbytes: layout.layersPerChunk * layout.numTokens * tokenNbytes,
      compressor: layout.compressor,
    });
    this.rgb =
      layout.pixels &&
      new Shards(files, {
        name: "pixels/rgb",
        numAxes: 5,
        numChunks: layout.samplesPerShard,
        chunkNbytes: 3 * layout.pixels[0] * layout.pixels[1],
        compressor: "zstd",
      });
  }

  /** Reads the root's zarr.json; of an unfinished cache, that of the sample table, too. */
  static async open(files: Files): Promise<CacheReader> {
    const bytes = await files.read("zarr.json", MAX_ROOT_NBYTES);
    if (bytes === null) {
      throw new CacheError("not-a-cache", `There is no cache at ${files.place}: it has no zarr.json.`);
    }
    let root: Record<string, any>;
    try {
      root = parseObject(files, "zarr.json", bytes);
    } catch {
      // Some servers answer every address with their page.
      throw new CacheError("not-a-cache", `There is no cache at ${files.place}: its zarr.json is not JSON.`);
    }
    const attributes = readAttributes(`${files.place}zarr.json`, root.attributes?.atcache);
    const consolidated: unknown = root.consolidated_metadata?.metadata;
    const isObject = typeof consolidated === "object" && consolidated !== null;
    const metadata = new Metadata(files, isObject ? (consolidated as Record<string, unknown>) : null);
    const { samplesGroup, numSamples } = attributes.layout;
    const table = await SampleTable.open(files, metadata, samplesGroup, numSamples);
    return new CacheReader(files, attributes, metadata, table);
  }

  get chunksPerSample(): number {
    const { numLayers, layersPerChunk } = this.attributes.layout;
    return numLayers / layersPerChunk;
  }

  /** The chunks of a view's codes, in bytes: each has `layersPerChunk` rows (token, component). */
  async readCodes(view: number, row: number): Promise<Chunk[]> {
    const { layout } = this.attributes;
    const { numTokens, numComponents } = layout;
    const chunks = await this.sampleChunks(this.codes, this.chunksPerSample, view, row);
    if (!COMPRESSORS[layout.compressor].isTransposed) return chunks;
    const itemsize = ITEMSIZES[layout.codesDtype];
    return chunks.map((chunk) => ({
      prefetch: chunk.prefetch,
      read: async () => untranspose(await chunk.read(), numTokens, numComponents, itemsize),
    }));
  }

  /** RGB, (height, width, 3); null if the cache stores no pixels. */
  async readPixels(view: number, row: number): Promise<Uint8Array<ArrayBuffer> | null> {
    return this.rgb && (await this.sampleChunks(this.rgb, 1, view, row))[0].read();
  }

  async readParameters(view: number, row: number): Promise<Record<string, number>> {
    await this.checkStored(view, row);
    const { parameterNames, samplesPerShard } = this.attributes.layout;
    const bytes = await this.viewBlock("parameters", 4 * parameterNames.length, view, row);
    if (bytes === null) throw missing(this.files.place, `views/parameters of view ${view}, row ${row}`);
    const values = new Float32Array(bytes.buffer);
    const start = (row % samplesPerShard) * parameterNames.length;
    return Object.fromEntries(parameterNames.map((name, at) => [name, values[start + at]]));
  }

  /** The codec's arrays by name, and the bias (layer, 1 or head, query, key), if there is one. */
  readState(): Promise<[Map<string, StateArray>, StateArray | null]> {
    const { files, metadata, attributes } = this;
    return Promise.all([readState(files, metadata, attributes), readBias(files, metadata, attributes)]);
  }

  async samples(start: number, stop: number): Promise<Sample[]> {
    const views = Array.from({ length: this.attributes.layout.numViews }, (_, view) => view);
    const described = await this.table.describe(start, stop);
    return Promise.all(
      described.map(async (sample) => ({
        ...sample,
        className: this.table.className(sample.label),
        status: await Promise.all(views.map((view) => this.status(view, sample.row))),
      })),
    );
  }

  /** The image file's bytes; null if its tar is not on the web, or cannot be read from here. */
  async imageBlob(row: number): Promise<Blob | null> {
    const { folder, tar, offset, nbytes } = await this.table.imagePlace(row);
    const isOnDisk = folder.startsWith("/") || /^(?!https?:)[a-z][a-z0-9+.-]*:/i.test(folder);
    if (isOnDisk || !(this.files instanceof WebFiles) || nbytes < 1 || nbytes > MAX_IMAGE_NBYTES) return null;
    // A relative folder was relative to where the build ran: mostly the folder that holds the cache.
    const place = new URL(`${folder}/`, new URL("..", this.files.place)).href;
    const tars = new WebFiles(place, this.files.fetched);
    return tars.readRange(tar, offset, nbytes).then(
      (bytes) => new Blob([bytes]),
      () => null,
    );
  }

  /** A number of STATUS_WORDS. */
  async status(view: number, row: number): Promise<number> {
    const { layout, hasAllCodes } = this.attributes;
    if (!parts(layout).some(([start, stop]) => row >= start && row < stop)) return NO_SAMPLE;
    if (hasAllCodes) return STORED;
    // A task puts its status in place after everything else, so where it is, the rest is.
    const block = await this.viewBlock("status", 1, view, row);
    return block === null ? PENDING : block[row % layout.samplesPerShard];
  }

  private async sampleChunks(shards: Shards, chunksPerSample: number, view: number, row: number): Promise<Chunk[]> {
    await this.checkStored(view, row);
    const { samplesPerShard } = this.attributes.layout;
    const block = Math.floor(row / samplesPerShard);
    const first = (row % samplesPerShard) * chunksPerSample;
    const chunks = await shards.chunks(view, block, first, first + chunksPerSample);
    if (chunks === null) throw damaged(this.files.place, shards.path(view, block), `it lacks row ${row}`);
    return chunks;
  }

  private async checkStored(view: number, row: number): Promise<void> {
    const { numViews, numSamples } = this.attributes.layout;
    const isIndex = (value: number, length: number): boolean => Number.isInteger(value) && value >= 0 && value < length;
    if (!isIndex(view, numViews) || !isIndex(row, numSamples)) {
      throw new CacheError(
        "no-such-sample",
        `There is no view ${view} of row ${row}: the cache has ${numViews} views of ${numSamples} rows.`,
      );
    }
    const status = await this.status(view, row);
    if (status === STORED) return;
    const why = STATUS_WORDS[status] ?? `status ${status}`;
    throw new CacheError("unfinished-sample", `View ${view} of row ${row} is not stored: ${why}.`);
  }

  private viewBlock(name: string, nbytes: number, view: number, row: number): Promise<Uint8Array<ArrayBuffer> | null> {
    const { samplesPerShard } = this.attributes.layout;
    const block = Math.floor(row / samplesPerShard);
    const array: ShardedArray = {
      name: `views/${name}`,
      numAxes: name === "parameters" ? 3 : 2,
      numChunks: 1,
      chunkNbytes: samplesPerShard * nbytes,
      compressor: "zstd",
    };
    return this.blocks.get(`${name}/${view}/${block}`, () => readSmallShard(this.files, array, view, block));
  }
}
