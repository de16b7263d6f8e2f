/** Chunks as bytes: the codecs [bytes, compressor, crc32c]. Sizes are checked before anything is decompressed. */

import { collect } from "./files";

/** What is wrong with a chunk or an index; whoever knows the file's name says which file. */
export class DamagedChunk extends Error {}

/** As `COMPRESSORS` in atcache/store/layout.py. */
export const COMPRESSORS: Record<string, { kind: "zstd" | "blosc" | "gzip"; isTransposed: boolean }> = {
  zstd: { kind: "zstd", isTransposed: false },
  "blosc-zstd-bitshuffle": { kind: "blosc", isTransposed: false },
  "transpose-blosc-zstd-shuffle": { kind: "blosc", isTransposed: true },
  "transpose-blosc-zstd-bitshuffle": { kind: "blosc", isTransposed: true },
  gzip: { kind: "gzip", isTransposed: false },
};

/** The `nbytes` bytes of a chunk, in the order in which they are stored. */
export async function decompress(
  encoded: Uint8Array<ArrayBuffer>,
  compressor: string,
  nbytes: number,
): Promise<Uint8Array<ArrayBuffer>> {
  const packed = withoutChecksum(encoded);
  const { kind } = COMPRESSORS[compressor];
  if (kind === "gzip") return inflate(packed, nbytes);
  const claimed = kind === "blosc" ? bloscNbytes(packed) : zstdNbytes(packed);
  if (claimed !== nbytes) throw new DamagedChunk(`a chunk claims ${claimed} bytes of content, expected ${nbytes}`);
  // Their WebAssembly is started when the first such chunk comes.
  const { default: library } = await (kind === "blosc" ? import("numcodecs/blosc") : import("numcodecs/zstd"));
  let content: Uint8Array;
  try {
    content = await library.fromConfig({ id: kind }).decode(packed);
  } catch {
    throw new DamagedChunk("a chunk cannot be decompressed");
  }
  if (content.length !== nbytes) throw new DamagedChunk(`a chunk has ${content.length} bytes, expected ${nbytes}`);
  return content as Uint8Array<ArrayBuffer>; // the library's copy, at the start of a buffer of its own
}

/** The bytes before a crc32c that fits them. */
export function withoutChecksum(encoded: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  const length = encoded.length - 4;
  if (length < 0 || littleEndian(encoded, length, 4) !== crc32c(encoded.subarray(0, length))) {
    throw new DamagedChunk("a checksum does not match");
  }
  return encoded.subarray(0, length);
}

async function inflate(packed: Uint8Array<ArrayBuffer>, nbytes: number): Promise<Uint8Array<ArrayBuffer>> {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const content = await collect(stream, nbytes).catch(() => {
    throw new DamagedChunk("a chunk cannot be decompressed");
  });
  if (content?.length !== nbytes) throw new DamagedChunk(`a chunk's content is not of ${nbytes} bytes`);
  return content;
}

function bloscNbytes(packed: Uint8Array): number {
  if (packed.length < 16) throw new DamagedChunk("a chunk is too short for blosc");
  const nbytes = littleEndian(packed, 4, 4);
  const blockNbytes = littleEndian(packed, 8, 4);
  const packedNbytes = littleEndian(packed, 12, 4);
  const isCopied = (packed[2] & 2) !== 0;
  const fits = packedNbytes === packed.length && (nbytes === 0 || (blockNbytes > 0 && blockNbytes <= nbytes));
  if (!fits || (isCopied && packedNbytes !== nbytes + 16)) throw new DamagedChunk("a blosc header contradicts itself");
  return nbytes;
}

/** Content size of a zstd frame (RFC 8878, section 3.1.1.1). */
function zstdNbytes(packed: Uint8Array): number {
  if (packed.length < 6 || littleEndian(packed, 0, 4) !== 0xfd2fb528) throw new DamagedChunk("a chunk is no zstd frame");
  const descriptor = packed[4];
  const isSingleSegment = (descriptor & 0x20) !== 0;
  const fieldNbytes = [isSingleSegment ? 1 : 0, 2, 4, 8][descriptor >> 6];
  const start = 5 + (isSingleSegment ? 0 : 1) + [0, 1, 2, 4][descriptor & 3];
  if (fieldNbytes === 0 || start + fieldNbytes > packed.length) {
    throw new DamagedChunk("a zstd frame does not state its size");
  }
  return littleEndian(packed, start, fieldNbytes) + (fieldNbytes === 2 ? 256 : 0);
}

export function littleEndian(bytes: Uint8Array, start: number, nbytes: number): number {
  let value = 0;
  for (let at = start + nbytes - 1; at >= start; at--) value = value * 256 + bytes[at];
  return value;
}

/** Undo `transpose` with order [0, 1, 2, 4, 3]: (layer, component, token) as stored becomes (layer, token, component). */
export function untranspose(
  stored: Uint8Array<ArrayBuffer>,
  numTokens: number,
  numComponents: number,
  itemsize: number,
): Uint8Array<ArrayBuffer> {
  const types = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array } as const;
  const Elements = types[itemsize as 1 | 2 | 4];
  const source = new Elements(stored.buffer, stored.byteOffset, stored.length / itemsize);
  const result = new Elements(source.length);
  const size = numTokens * numComponents;
  for (let start = 0; start < source.length; start += size) {
    for (let component = 0, from = start; component < numComponents; component++) {
      for (let token = 0, to = start + component; token < numTokens; token++, to += numComponents) {
        result[to] = source[from++];
      }
    }
  }
  return new Uint8Array(result.buffer);
}

const CRC32C_POLYNOMIAL = 0x82f63b78;
let tables: Int32Array[] | null = null;

/** Tables to take four bytes at a time. Signed: engines keep unsigned 32-bit numbers as doubles, six times as slow. */
function crcTables(): Int32Array[] {
  if (tables !== null) return tables;
  const made = Array.from({ length: 4 }, () => new Int32Array(256));
  for (let byte = 0; byte < 256; byte++) {
    let crc = byte;
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ CRC32C_POLYNOMIAL : crc >>> 1;
    made[0][byte] = crc;
  }
  for (let byte = 0; byte < 256; byte++) {
    for (let which = 1; which < 4; which++) {
      const before = made[which - 1][byte];
      made[which][byte] = (before >>> 8) ^ made[0][before & 255];
    }
  }
  return (tables = made);
}

export function crc32c(bytes: Uint8Array): number {
  const [t0, t1, t2, t3] = crcTables();
  const words = bytes.length - (bytes.length % 4);
  let crc = -1;
  let at = 0;
  for (; at < words; at += 4) {
    crc ^= bytes[at] | (bytes[at + 1] << 8) | (bytes[at + 2] << 16) | (bytes[at + 3] << 24);
    crc = t3[crc & 255] ^ t2[(crc >>> 8) & 255] ^ t1[(crc >>> 16) & 255] ^ t0[crc >>> 24];
  }
  for (; at < bytes.length; at++) crc = (crc >>> 8) ^ t0[(crc ^ bytes[at]) & 255];
  return ~crc >>> 0;
}
