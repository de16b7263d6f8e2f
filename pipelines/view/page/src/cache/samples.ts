/** The sample table, read in stretches of rows as they are needed. */

import type { ArrayInfo, Metadata } from "./arrays";
import { readTableChunk } from "./arrays";
import { littleEndian } from "./chunks";
import { damaged, missing, type Files } from "./files";
import { Kept } from "./kept";
import { CacheError } from "./types";

const COLUMNS = { key: "uint8", tar: "int32", label: "int64", problem: "uint8", offset: "int64", nbytes: "int64" };
type Name = keyof typeof COLUMNS;

const KEPT_NBYTES = 2 ** 28; // decoded: all that a search reads of 5 million samples with keys of 32 bytes
export const NO_SAMPLE = 255;

/** Where a sample's image lies. */
export interface ImagePlace {
  /** As recorded at build time: a path or a URL. */
  folder: string;
  tar: string;
  offset: number;
  nbytes: number;
}

/** One chunk of a column: rows from `start` to `stop` - 1. */
class Column {
  readonly stop: number;

  constructor(
    readonly bytes: Uint8Array,
    readonly start: number,
    private readonly info: ArrayInfo,
  ) {
    this.stop = Math.min(start + info.chunkRows, info.shape[0]);
  }

  row(row: number): Uint8Array {
    const at = (row - this.start) * this.info.rowNbytes;
    return this.bytes.subarray(at, at + this.info.rowNbytes);
  }

  /** As a signed number; up to 2^53 in size. */
  number(row: number): number {
    const bytes = this.row(row);
    const value = littleEndian(bytes, 0, bytes.length);
    return bytes.length > 1 && bytes.at(-1)! > 127 ? value - 256 ** bytes.length : value;
  }
}

/** Some columns of the rows from `start` to `stop` - 1. */
class Stretch {
  readonly stop: number;

  constructor(
    readonly start: number,
    private readonly columns: Map<Name, Column>,
  ) {
    this.stop = Math.min(...[...columns.values()].map((column) => column.stop));
  }

  number(name: Name, row: number): number {
    return this.columns.get(name)!.number(row);
  }

  /** The key's bytes, without the padding. */
  key(row: number): Uint8Array {
    const bytes = this.columns.get("key")!.row(row);
    let length = bytes.length;
    while (length > 0 && bytes[length - 1] === 0) length--;
    return bytes.subarray(0, length);
  }
}

export class SampleTable {
  private readonly infos = new Kept<Name, ArrayInfo>();
  private readonly chunks = new Kept<string, Uint8Array<ArrayBuffer>>(KEPT_NBYTES);
  private readonly decoder = new TextDecoder();

  private constructor(
    private readonly files: Files,
    private readonly metadata: Metadata,
    private readonly group: string,
    private readonly numRows: number,
    private readonly tars: string[],
    private readonly folders: string[],
    readonly classes: string[],
  ) {}

  /** Reads the group's attributes only. */
  static async open(files: Files, metadata: Metadata, group: string, numRows: number): Promise<SampleTable> {
    const found = await metadata.get(group);
    if (found === null) throw missing(files.place, `${group}/zarr.json`);
    const texts = (name: string): string[] => {
      const value: unknown = found.attributes?.[name] ?? [];
      if (Array.isArray(value) && value.every((each) => typeof each === "string")) return value;
      throw damaged(files.place, `${group}/zarr.json`, `"${name}" is not a list of texts`);
    };
    return new SampleTable(files, metadata, group, numRows, texts("tars"), texts("folders"), texts("classes"));
  }

  className(label: number): string {
    return this.classes[label] ?? "";
  }

  /** "TAR/KEY" and label of rows. */
  async describe(start: number, stop: number): Promise<{ row: number; key: string; label: number }[]> {
    const samples: { row: number; key: string; label: number }[] = [];
    for await (const stretch of this.stretches(["key", "tar", "label"], start, stop)) {
      for (let row = stretch.start; row < Math.min(stretch.stop, stop); row++) {
        samples.push({ row, key: this.sampleKey(stretch, row), label: stretch.number("label", row) });
      }
    }
    return samples;
  }

  async find(sampleKey: string): Promise<number> {
    const slash = sampleKey.indexOf("/");
    const tar = this.tars.indexOf(sampleKey.slice(0, slash));
    const wanted = new TextEncoder().encode(sampleKey.slice(slash + 1));
    let found: number | null = null;
    for await (const stretch of this.stretches(["key", "tar", "problem"])) {
      for (let row = stretch.start; row < stretch.stop; row++) {
        const key = stretch.key(row);
        const isIt =
          stretch.number("tar", row) === tar &&
          key.length === wanted.length &&
          key.every((byte, at) => byte === wanted[at]);
        if (!isIt) continue;
        // A sample whose key came before keeps its row, marked as a problem. The good row is meant.
        if (stretch.number("problem", row) === 0) return row;
        found ??= row;
      }
    }
    if (found !== null) return found;
    const [example] = await this.describe(0, 1);
    throw new CacheError("no-such-sample", `No sample has the key "${sampleKey}"; the first is "${example.key}".`);
  }

  /** Rows whose key contains `text`, whatever its case, and whose class has this name: several may have it. */
  async search(text: string, className: string | undefined, limit: number): Promise<number[]> {
    const ofClass = (name: string, label: number) => (name === className ? [label] : []);
    const labels = className === undefined ? null : new Set(this.classes.flatMap(ofClass));
    const wanted = text.toLowerCase();
    const rows: number[] = [];
    for await (const stretch of this.stretches(["key", "tar", "label", "problem"])) {
      for (let row = stretch.start; row < stretch.stop; row++) {
        if (stretch.number("problem", row) === NO_SAMPLE) continue;
        if (labels !== null && !labels.has(stretch.number("label", row))) continue;
        if (wanted && !this.sampleKey(stretch, row).toLowerCase().includes(wanted)) continue;
        rows.push(row);
        if (rows.length >= limit) return rows;
      }
    }
    return rows;
  }

  async imagePlace(row: number): Promise<ImagePlace> {
    for await (const stretch of this.stretches(["tar", "offset", "nbytes"], row, row + 1)) {
      const tar = stretch.number("tar", row);
      return {
        folder: this.folders[tar] ?? "",
        tar: this.tars[tar] ?? "",
        offset: stretch.number("offset", row),
        nbytes: stretch.number("nbytes", row),
      };
    }
    throw new CacheError("no-such-sample", `There is no row ${row}: the cache has ${this.numRows}.`);
  }

  private sampleKey(stretch: Stretch, row: number): string {
    return `${this.tars[stretch.number("tar", row)] ?? "?"}/${this.decoder.decode(stretch.key(row))}`;
  }

  private async *stretches(names: Name[], start = 0, stop = this.numRows): AsyncGenerator<Stretch> {
    for (let row = start; row < Math.min(stop, this.numRows); ) {
      const columns = await Promise.all(names.map(async (name) => [name, await this.column(name, row)] as const));
      const stretch = new Stretch(row, new Map(columns));
      yield stretch;
      row = stretch.stop;
    }
  }

  private async column(name: Name, row: number): Promise<Column> {
    const info = await this.infos.get(name, () => this.info(name));
    const chunk = Math.floor(row / info.chunkRows);
    const read = () => readTableChunk(this.files, info, chunk);
    const bytes = await this.chunks.get(`${name}/${chunk}`, read, info.chunkRows * info.rowNbytes);
    return new Column(bytes, chunk * info.chunkRows, info);
  }

  private async info(name: Name): Promise<ArrayInfo> {
    const path = `${this.group}/${name}`;
    const info = await this.metadata.array(path);
    if (info === null) throw missing(this.files.place, `${path}/zarr.json`);
    const numAxes = name === "key" ? 2 : 1;
    if (info.shape[0] !== this.numRows || info.shape.length !== numAxes || info.dtype !== COLUMNS[name]) {
      throw damaged(this.files.place, `${path}/zarr.json`, `it is of ${info.shape.join(" x ")} ${info.dtype}`);
    }
    return info;
  }
}
