/** Arrays of a cache: small tables and state, whose metadata says their shape, and shards, whose layout does. */

import { DamagedChunk, decompress, littleEndian, withoutChecksum } from "./chunks";
import { damaged, missing, type Files } from "./files";
import { Kept } from "./kept";
import { CacheError } from "./types";

export interface ArrayInfo {
  path: string;
  shape: number[];
  /** Rows of a chunk; all other axes are whole. */
  chunkRows: number;
  dtype: string;
  rowNbytes: number;
}

const DTYPES: Record<string, number> = {
  int8: 1,
  uint8: 1,
  float16: 2,
  int32: 4,
  float32: 4,
  int64: 8,
};
const MAX_ARRAY_NBYTES = 2 ** 31 - 1;
const MAX_METADATA_NBYTES = 2 ** 20;
const EMPTY = 2 ** 64;

/** An upper bound for an encoded chunk. */
function maxEncodedNbytes(nbytes: number): number {
  return nbytes + Math.ceil(nbytes / 64) + 1024;
}

/** Metadata of arrays, by path: from the root's consolidated metadata, or else from their own files. */
export class Metadata {
  constructor(
    private readonly files: Files,
    private readonly consolidated: Record<string, unknown> | null,
  ) {}

  /** Null if there is no such array or group. */
  async get(path: string): Promise<Record<string, any> | null> {
    if (this.consolidated !== null) return (this.consolidated[path] ?? null) as Record<string, any> | null;
    const bytes = await this.files.read(`${path}/zarr.json`, MAX_METADATA_NBYTES);
    return bytes && parseObject(this.files, `${path}/zarr.json`, bytes);
  }

  /** Names of the arrays in a group; null if that is not known, as in an unfinished cache on a server. */
  names(group: string): string[] | null {
    if (this.consolidated === null) return null;
    const prefix = `${group}/`;
    const paths = Object.keys(this.consolidated).filter((path) => path.startsWith(prefix));
    return paths.map((path) => path.slice(prefix.length));
  }

  /** A table or an array of the state; null if there is none. */
  async array(path: string): Promise<ArrayInfo | null> {
    const metadata = await this.get(path);
    if (metadata === null) return null;
    const { shape, data_type: dtype, chunk_grid: grid, codecs } = metadata;
    const chunk: unknown = grid?.configuration?.chunk_shape;
    const isShape = (value: unknown): value is number[] =>
      Array.isArray(value) && value.length > 0 && value.every((side) => Number.isInteger(side) && side >= 1);
    const names = Array.isArray(codecs) ? codecs.map((codec) => codec?.name).join() : "";
    const fits =
      isShape(shape) &&
      isShape(chunk) &&
      chunk.length === shape.length &&
      chunk.every((side, axis) => axis === 0 || side === shape[axis]) &&
      Object.hasOwn(DTYPES, dtype) &&
      names === "bytes,zstd,crc32c";
    if (!fits) {
      throw damaged(this.files.place, `${path}/zarr.json`, "it does not describe a table of whole rows under zstd");
    }
    const rowNbytes = shape.slice(1).reduce((product, side) => product * side, DTYPES[dtype]);
    const nbytes = Math.max(shape[0], chunk[0]) * rowNbytes;
    if (nbytes > MAX_ARRAY_NBYTES) {
      throw new CacheError(
        "too-large",
        `${this.files.place}${path} has ${nbytes} bytes, more than the ${MAX_ARRAY_NBYTES} that this page reads at once.`,
      );
    }
    return { path, shape, chunkRows: chunk[0], dtype, rowNbytes };
  }
}

export function parseObject(files: Files, path: string, bytes: Uint8Array): Record<string, any> {
  try {
    const value: unknown = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
    if (typeof value === "object" && value !== null) return value;
  } catch {
    // Not JSON; said below.
  }
  throw damaged(files.place, path, "it is not a JSON object");
}

/** The rows of one chunk. Rows behind the array's end are padding. */
export async function readTableChunk(files: Files, info: ArrayInfo, chunk: number): Promise<Uint8Array<ArrayBuffer>> {
  const path = [info.path, "c", chunk, ...info.shape.slice(1).map(() => 0)].join("/");
  const nbytes = info.chunkRows * info.rowNbytes;
  const encoded = await files.read(path, maxEncodedNbytes(nbytes));
  if (encoded === null) throw missing(files.place, path);
  return naming(files, path, () => decompress(encoded, "zstd", nbytes));
}

/** All elements of an array, in C order. */
export async function readTable(files: Files, info: ArrayInfo): Promise<Uint8Array<ArrayBuffer>> {
  const chunkNbytes = info.chunkRows * info.rowNbytes;
  const numChunks = Math.ceil(info.shape[0] / info.chunkRows);
  const whole = new Uint8Array(info.shape[0] * info.rowNbytes);
  const numbers = Array.from({ length: numChunks }, (_, chunk) => chunk);
  const chunks = await Promise.all(numbers.map((chunk) => readTableChunk(files, info, chunk)));
  chunks.forEach((bytes, chunk) => {
    const start = chunk * chunkNbytes;
    whole.set(bytes.subarray(0, Math.min(chunkNbytes, whole.length - start)), start);
  });
  return whole;
}

/** A sharded array, (view, sample, ...), whose shards are one block of one view each. */
export interface ShardedArray {
  name: string;
  numAxes: number;
  /** Index entries of a shard. */
  numChunks: number;
  /** Decompressed. */
  chunkNbytes: number;
  compressor: string;
}

const GROUP_NBYTES = 2 ** 20;
const GAP_NBYTES = 2 ** 16;
const KEPT_INDEXES = 64;

/** A chunk that is fetched when it is first wanted. */
export interface Chunk {
  prefetch(): void;
  /** Decompressed. */
  read(): Promise<Uint8Array<ArrayBuffer>>;
}

interface Range {
  /** The chunk's place among those that were asked for. */
  at: number;
  offset: number;
  end: number;
}

/** Ranges that are worth one request: small gaps between them, and not much altogether. */
function neighbours(ranges: Range[]): Range[][] {
  const groups: Range[][] = [];
  let end = -Infinity;
  for (const range of [...ranges].sort((one, other) => one.offset - other.offset)) {
    const group = groups.at(-1);
    const isNear = group && range.offset - end <= GAP_NBYTES && range.end - group[0].offset <= GROUP_NBYTES;
    if (isNear) group.push(range);
    else groups.push([range]);
    end = isNear ? Math.max(end, range.end) : range.end;
  }
  return groups;
}

/** Calls `make` at the first use, and again after a failure. */
export function once<Value>(make: () => Promise<Value>): () => Promise<Value> {
  let value: Promise<Value> | null = null;
  return () => {
    if (value === null) {
      value = make();
      value.catch(() => (value = null));
    }
    return value;
  };
}

/** Shards of one array: their indexes, and chunks of them. */
export class Shards {
  private readonly indexes = new Kept<string, BigUint64Array | null>(KEPT_INDEXES);

  constructor(
    private readonly files: Files,
    private readonly array: ShardedArray,
  ) {}

  path(view: number, block: number): string {
    return [this.array.name, "c", view, block, ...new Array<number>(this.array.numAxes - 2).fill(0)].join("/");
  }

  /** The chunks first to stop - 1 of a shard; neighbours come in one request. Null if the shard or one of them is not
   * there. */
  async chunks(view: number, block: number, first: number, stop: number): Promise<Chunk[] | null> {
    const index = await this.index(view, block);
    if (index === null) return null;
    const ranges = Array.from({ length: stop - first }, (_, at) => {
      const offset = Number(index[2 * (first + at)]);
      return { at, offset, end: offset + Number(index[2 * (first + at) + 1]) };
    });
    if (ranges.some(({ offset }) => offset === EMPTY)) return null;
    const path = this.path(view, block);
    const chunks = new Array<Chunk>(ranges.length);
    for (const group of neighbours(ranges)) {
      const start = group[0].offset;
      const end = Math.max(...group.map((range) => range.end));
      const fetched = once(() => this.files.readRange(path, start, end - start));
      for (const { at, offset, end } of group) {
        chunks[at] = {
          prefetch: () => void fetched().catch(() => {}), // whoever reads it gets the error
          read: async () => this.decode(path, (await fetched()).subarray(offset - start, end - start)),
        };
      }
    }
    return chunks;
  }

  private decode(path: string, encoded: Uint8Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>> {
    return naming(this.files, path, () => decompress(encoded, this.array.compressor, this.array.chunkNbytes));
  }

  private index(view: number, block: number): Promise<BigUint64Array | null> {
    const path = this.path(view, block);
    return this.indexes.get(path, () => this.readIndex(path));
  }

  private async readIndex(path: string): Promise<BigUint64Array | null> {
    const { numChunks, chunkNbytes } = this.array;
    const nbytes = 16 * numChunks + 4;
    const end = await this.files.readEnd(path, nbytes);
    if (end === null) return null;
    return naming(this.files, path, () => checkedIndex(end.bytes, nbytes, end.size, maxEncodedNbytes(chunkNbytes)));
  }
}

/** A shard with one chunk is fetched whole: one request, and it is small. Null if it is not there. */
export async function readSmallShard(
  files: Files,
  array: ShardedArray,
  view: number,
  block: number,
): Promise<Uint8Array<ArrayBuffer> | null> {
  const path = [array.name, "c", view, block, ...new Array<number>(array.numAxes - 2).fill(0)].join("/");
  const largest = maxEncodedNbytes(array.chunkNbytes);
  const bytes = await files.read(path, largest + 20);
  if (bytes === null) return null;
  return naming(files, path, () => {
    const end = bytes.slice(Math.max(0, bytes.length - 20));
    const index = checkedIndex(end, 20, bytes.length, largest);
    const offset = Number(index[0]);
    if (offset === EMPTY) throw new DamagedChunk("it lacks its chunk");
    return decompress(bytes.subarray(offset, offset + Number(index[1])), array.compressor, array.chunkNbytes);
  });
}

/** Offset and nbytes of each chunk, all of them checked to lie before the index. */
function checkedIndex(
  bytes: Uint8Array<ArrayBuffer>,
  nbytes: number,
  fileNbytes: number,
  largest: number,
): BigUint64Array {
  if (bytes.length !== nbytes) throw new DamagedChunk("it is too short for its index");
  const content = withoutChecksum(bytes);
  for (let at = 0; at < content.length; at += 16) {
    const offset = littleEndian(content, at, 8);
    const length = littleEndian(content, at + 8, 8);
    const isEmpty = offset === EMPTY && length === EMPTY;
    const isInside = length > 4 && length <= largest && offset + length <= fileNbytes - nbytes;
    if (!isEmpty && !isInside) throw new DamagedChunk("its index points outside of it");
  }
  return new BigUint64Array(content.slice().buffer);
}

/** What `read` gives; damage that it finds names the file. */
async function naming<Result>(files: Files, path: string, read: () => Result | Promise<Result>): Promise<Result> {
  try {
    return await read();
  } catch (error) {
    if (error instanceof DamagedChunk || error instanceof RangeError) throw damaged(files.place, path, error.message);
    throw error;
  }
}

