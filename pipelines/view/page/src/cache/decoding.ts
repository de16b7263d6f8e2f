/** From a view's codes to its layers, by the codec of the cache. */

import { decodeExact } from "../codecs/exact";
import { decodeInt8 } from "../codecs/int8";
import type { Layer, Shape } from "../codecs/layers";
import { decodeLogmap } from "../codecs/logmap";
import type { StateArray } from "../codecs/state";
import { TransformDecoder } from "../codecs/transform";
import { once, type Chunk } from "./arrays";
import { Kept } from "./kept";
import type { CacheReader } from "./reader";
import { CacheError } from "./types";
import { breathe, DecodedView, type LayerSource } from "./view";

const MAX_KEPT_NBYTES = 2 ** 28; // decoded views; one is always kept

/** Decodes views of one cache, and keeps the last ones. */
export class ViewDecoder {
  private readonly views = new Map<string, DecodedView>();
  private readonly shape: Shape;
  private readonly numKept: number;
  /** What all views need. Asked for when the cache is opened, since the first picture waits for it. */
  readonly prepare = once(() => this.readPrepared());

  constructor(private readonly reader: CacheReader) {
    const { geometry, codec } = reader.attributes;
    const { heads, layers, numKvHeads, headDim, numTokens, numQueries, scale } = geometry;
    this.shape = { numHeads: heads.length, numKvHeads, headDim, numTokens, numQueries, scale };
    const vectorNbytes = 4 * (heads.length + numKvHeads) * headDim;
    const tokenNbytes = codec.name === "logmap" ? 4 * heads.length * numQueries : vectorNbytes;
    this.numKept = Math.max(1, Math.floor(MAX_KEPT_NBYTES / (layers.length * numTokens * tokenNbytes)));
  }

  private async readPrepared(): Promise<{ bias: StateArray | null; transform: TransformDecoder | null }> {
    const [state, bias] = await this.reader.readState();
    const { codec, geometry } = this.reader.attributes;
    const biasOf = (position: number): Float32Array | null => bias && bias.floats(position);
    const transform =
      codec.name === "transform" ? new TransformDecoder(codec, state, geometry, this.shape, biasOf) : null;
    return { bias, transform };
  }

  view(view: number, row: number): DecodedView {
    const name = `${view}/${row}`;
    const found = this.views.get(name) ?? new DecodedView(this.open(view, row), this.shape, this.numLayers);
    this.views.delete(name); // and behind all others, as the one used last
    this.views.set(name, found);
    if (this.views.size > this.numKept) this.views.delete(this.views.keys().next().value!);
    return found;
  }

  private get numLayers(): number {
    return this.reader.attributes.geometry.layers.length;
  }

  private open(view: number, row: number): LayerSource {
    const { codec, layout } = this.reader.attributes;
    const codes = once(() => this.reader.readCodes(view, row));
    const chunkOf = async (position: number): Promise<Chunk> =>
      (await codes())[codec.name === "transform" ? 0 : Math.floor(position / layout.layersPerChunk)];
    const prefetch = (position: number): void => {
      chunkOf(position).then(
        (chunk) => chunk.prefetch(),
        () => {}, // whoever reads it gets the error
      );
    };
    const openChain = once(async () => {
      const { transform } = await this.prepare();
      const rows = await Promise.all((await codes()).map((chunk) => chunk.read()));
      return transform!.open(joined(rows));
    });
    // All layers of a chunk at once: it is decompressed as a whole.
    const chunkLayers = new Kept<number, Layer[]>();
    const decodeChunk = async (first: number, bias: StateArray | null): Promise<Layer[]> => {
      const rows = await (await chunkOf(first)).read();
      const rowNbytes = rows.length / layout.layersPerChunk;
      return Array.from({ length: layout.layersPerChunk }, (_, at) =>
        this.decodeRow(rows.slice(at * rowNbytes, (at + 1) * rowNbytes), bias && bias.floats(first + at)),
      );
    };
    const decode = async (position: number, isWanted: () => boolean): Promise<Layer> => {
      prefetch(position); // on its way while the state is
      const { bias, transform } = await this.prepare();
      if (transform !== null) {
        const opened = await openChain();
        while (opened.stepsTo(position) > 0) {
          opened.step();
          await breathe();
          if (!isWanted()) throw new DOMException("another view is shown by now", "AbortError");
        }
        return opened.take(position);
      }
      const at = position % layout.layersPerChunk;
      const first = position - at;
      return (await chunkLayers.get(first, () => decodeChunk(first, bias)))[at];
    };
    return {
      prefetch,
      layer: (position, isWanted) =>
        decode(position, isWanted).catch((error: unknown) => {
          if (!(error instanceof RangeError)) throw error;
          throw new CacheError("damaged", `View ${view} of row ${row} cannot be decoded: ${error.message}.`);
        }),
    };
  }

  private decodeRow(codes: Uint8Array<ArrayBuffer>, bias: Float32Array | null): Layer {
    const { codec, layout } = this.reader.attributes;
    switch (codec.name) {
      case "exact":
        return decodeExact(codes, codec.isHalf, layout.numComponents, this.shape, bias);
      case "int8":
        return decodeInt8(codes, layout.numComponents, this.shape, bias);
      case "logmap":
        return decodeLogmap(codes, codec.bits, this.shape);
      case "transform":
        throw new Error("its layers are decoded in a chain");
    }
  }
}

function joined(pieces: Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}
