/** Codec `transform`: from the two rows of bytes of a view to the components of its layers. */

import type { GridTokens } from "./grid";

const KINDS = [8, 4, 2]; // bits of a cell, for buckets 1 to 85, 86 to 170 and 171 to 255

/** The cells of one layer, band and component: consecutive ones of their kind. */
interface Block {
  kind: number;
  bucket: number;
  layer: number;
  band: number;
  component: number;
  firstCell: number;
}

/** Where the cells of every layer lie. The same for all views of a cache. */
export class Packing {
  /** Components of each layer, up to the last one that has cells. */
  readonly numComponents: number[];
  private readonly blocks: Block[][];
  private readonly kindNbytes: number[];
  private readonly kindStarts: number[];

  /** `buckets` is (layer, band, component), of the shape that is given. */
  constructor(
    buckets: Uint8Array,
    [numLayers, numBands, width]: number[],
    private readonly bands: [number, number][],
    readonly numCoefficients: number,
  ) {
    if (numBands !== bands.length) throw new RangeError(`${numBands} bands are packed, the grid has ${bands.length}`);
    this.blocks = Array.from({ length: numLayers }, () => []);
    this.numComponents = new Array<number>(numLayers).fill(0);
    const all: Block[] = [];
    for (let layer = 0, at = 0; layer < numLayers; layer++) {
      for (let band = 0; band < bands.length; band++) {
        for (let component = 0; component < width; component++, at++) {
          const bucket = buckets[at];
          if (bucket === 0) continue;
          all.push({ kind: Math.floor((bucket - 1) / 85), bucket, layer, band, component, firstCell: 0 });
          this.numComponents[layer] = Math.max(this.numComponents[layer], component + 1);
        }
      }
    }
    // Stable, so that layer, band and component stay in order; a bucket belongs to one kind.
    all.sort((one, other) => one.bucket - other.bucket);
    const numCells = [0, 0, 0];
    for (const block of all) {
      block.firstCell = numCells[block.kind];
      numCells[block.kind] += this.width(block.band);
      this.blocks[block.layer].push(block);
    }
    this.kindNbytes = numCells.map((count, kind) => Math.ceil((count * KINDS[kind]) / 8));
    this.kindStarts = [0, this.kindNbytes[0], this.kindNbytes[0] + this.kindNbytes[1]];
  }

  /** Bytes of the first row that hold cells. */
  get nbytes(): number {
    return this.kindNbytes.reduce((sum, nbytes) => sum + nbytes, 0);
  }

  private width(band: number): number {
    return this.bands[band][1] - this.bands[band][0];
  }

  /** Unsigned cells of a layer, (coefficient, component), without what is missing in them. */
  cells(row: Uint8Array, layer: number): Uint32Array {
    const count = this.numComponents[layer];
    const cells = new Uint32Array(this.numCoefficients * count);
    for (const { kind, band, component, firstCell } of this.blocks[layer]) {
      const bits = KINDS[kind];
      const nbytes = this.kindNbytes[kind];
      const start = this.kindStarts[kind];
      const mask = 2 ** bits - 1;
      const [first, stop] = this.bands[band];
      for (let coefficient = first, cell = firstCell; coefficient < stop; coefficient++, cell++) {
        const shift = Math.floor(cell / nbytes) * bits;
        cells[coefficient * count + component] = (row[start + (cell % nbytes)] >> shift) & mask;
      }
    }
    return cells;
  }
}

/** What is missing in the cells of each layer, from the second row: cell and number, in pairs. */
export function readEscapes(row: Uint8Array, packing: Packing): number[][] {
  const ends: number[] = [];
  for (const count of packing.numComponents) ends.push((ends.at(-1) ?? 0) + count * packing.numCoefficients);
  const ofLayer: number[][] = ends.map(() => []);
  const numSlots = Math.floor(row.length / 5);
  const byte = (which: number, slot: number): number => row[which * numSlots + slot];
  for (let slot = 0, place = -1, layer = 0; slot < numSlots; slot++) {
    const distance = byte(0, slot) + 256 * byte(1, slot);
    if (distance === 0) break;
    place += distance;
    while (layer < ends.length && place >= ends[layer]) layer++;
    if (layer === ends.length) throw new RangeError("the list of escapes goes beyond the last cell");
    const missing = byte(2, slot) + 256 * byte(3, slot) + 65536 * byte(4, slot);
    ofLayer[layer].push(place - (ends[layer - 1] ?? 0), missing);
  }
  return ofLayer;
}

/** What the integers of a layer stand for, (coefficient, component). */
export function readComponents(
  row: Uint8Array,
  escapes: number[],
  layer: number,
  packing: Packing,
  shrink: Float32Array,
): Float32Array {
  const cells = packing.cells(row, layer);
  for (let at = 0; at < escapes.length; at += 2) cells[escapes[at]] += escapes[at + 1];
  const components = new Float32Array(cells.length);
  for (let at = 0; at < cells.length; at++) {
    const cell = cells[at];
    if (cell === 0) continue;
    const size = (cell + 1) >>> 1;
    const value = size + shrink[Math.min(size, 3) - 1];
    components[at] = cell & 1 ? -value : value;
  }
  return components;
}

/** The bands of coefficients, and the place (row * width + column) that each coefficient after the prefix is of. */
export function frequencyBands(tokens: GridTokens, dct: boolean): { bands: [number, number][]; order: Int32Array } {
  const { numPrefix, gridHeight: height, gridWidth: width } = tokens;
  const places = Array.from({ length: height * width }, (_, place) => place);
  const square = (place: number): number =>
    (Math.floor(place / width) * width) ** 2 + ((place % width) * height) ** 2;
  if (dct) places.sort((one, other) => square(one) - square(other) || one - other);
  const frequency = places.map((place) => Math.hypot(Math.floor(place / width) / height, (place % width) / width));
  const ends = dct
    ? [0, 0.1, 0.2, 0.32, 0.5, 0.75].map((end) => frequency.filter((each) => each <= end + 1e-12).length)
    : [];
  const edges = [0, numPrefix, ...ends.map((end) => numPrefix + end), numPrefix + places.length];
  const bands: [number, number][] = [];
  for (let at = 1; at < edges.length; at++) if (edges[at] > edges[at - 1]) bands.push([edges[at - 1], edges[at]]);
  return { bands, order: Int32Array.from(places) };
}
