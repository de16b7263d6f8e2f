/** From numbers to colours. The points are matplotlib's viridis and magma (CC0), joined by straight lines. */

const POINTS = {
  viridis: "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725",
  magma: "000004 140e36 3b0f70 641a80 8c2981 b73779 de4968 f7705c fe9f6d fecf92 fcfdbf",
  /** ColorBrewer's RdBu, turned around: blue is less, red is more. */
  difference: "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f",
};

export type ColourMap = keyof typeof POINTS;
export const COLOUR_MAPS: ColourMap[] = ["viridis", "magma"];

const tables = new Map<ColourMap, Uint32Array>();

/** 256 colours as the 32-bit words of an ImageData. */
export function colourTable(name: ColourMap): Uint32Array {
  const known = tables.get(name);
  if (known) return known;
  const points = POINTS[name].split(" ").map((hex) => [0, 2, 4].map((start) => parseInt(hex.slice(start, start + 2), 16)));
  const bytes = new Uint8ClampedArray(256 * 4);
  for (let step = 0; step < 256; step++) {
    const place = (step / 255) * (points.length - 1);
    const first = Math.min(Math.floor(place), points.length - 2);
    const [from, to] = [points[first]!, points[first + 1]!];
    for (let channel = 0; channel < 3; channel++) {
      bytes[step * 4 + channel] = Math.round(from[channel]! + (to[channel]! - from[channel]!) * (place - first));
    }
    bytes[step * 4 + 3] = 255;
  }
  const table = new Uint32Array(bytes.buffer);
  tables.set(name, table);
  return table;
}

/** What the colours mean: `low` has the first colour, `high` the last one. */
export interface Scale {
  colours: ColourMap;
  low: number;
  high: number;
}

/** Which of the 256 colours a number has. */
export function colourIndex(value: number, { low, high }: Scale): number {
  const share = high > low ? (value - low) / (high - low) : 0;
  return Math.max(0, Math.min(255, Math.round(share * 255)));
}

export function cssColour(index: number, name: ColourMap): string {
  const [red, green, blue] = new Uint8Array(colourTable(name).buffer, index * 4, 3);
  return `rgb(${red}, ${green}, ${blue})`;
}

/** Write one map's colours, row by row, into the words of an image that is `stride` words wide. */
export function paintMap(
  words: Uint32Array,
  start: number,
  stride: number,
  values: Float32Array,
  [rows, columns]: [number, number],
  scale: Scale,
): void {
  const table = colourTable(scale.colours);
  const factor = scale.high > scale.low ? 255 / (scale.high - scale.low) : 0;
  for (let row = 0, key = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, key++) {
      const index = (values[key]! - scale.low) * factor;
      words[start + row * stride + column] = table[index <= 0 ? 0 : index >= 255 ? 255 : (index + 0.5) | 0]!;
    }
  }
}
