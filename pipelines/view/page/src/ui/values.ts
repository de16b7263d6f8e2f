/** What is worked out from the decoded rows of one query: all plain functions on Float32Arrays. */

/** The rows of one query in all layers and heads, axes (layer, head, key). Layers that are not there yet are not ready. */
export interface Wall {
  values: Float32Array;
  numLayers: number;
  numHeads: number;
  numKeys: number;
  ready: boolean[];
}

/** One row of the wall; not a copy. */
export function rowOf(wall: Wall, layer: number, head: number): Float32Array {
  const start = (layer * wall.numHeads + head) * wall.numKeys;
  return wall.values.subarray(start, start + wall.numKeys);
}

/** The heads of a layer in one row. The maximum's sum may be over 1. */
export function combineHeads(wall: Wall, layer: number, how: "mean" | "max"): Float32Array {
  const joined = new Float32Array(wall.numKeys);
  for (let head = 0; head < wall.numHeads; head++) {
    const row = rowOf(wall, layer, head);
    for (let key = 0; key < row.length; key++) {
      if (how === "max") joined[key] = Math.max(joined[key]!, row[key]!);
      else joined[key]! += row[key]! / wall.numHeads;
    }
  }
  return joined;
}

export function subtract(a: Float32Array, b: Float32Array): Float32Array {
  return a.map((value, index) => value - b[index]!);
}

export function sum(values: Float32Array): number {
  return values.reduce((total, value) => total + value, 0);
}

/** The q-quantile of the absolute values of all patches, a little rounded up (to 1/256 of itself), over rows of
 * `numKeys` of which the first `numPrefix` are no patches. Counted in bins of the numbers' own bits: one pass, which is
 * fast enough for every move of the pointer. What is no number is not counted. */
export function patchQuantile(values: Float32Array, numKeys: number, numPrefix: number, q: number): number {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  const counts = new Uint32Array(1 << 16);
  let total = 0;
  for (let start = 0; start < bits.length; start += numKeys) {
    for (let index = start + numPrefix; index < start + numKeys; index++) {
      const size = bits[index]! & 0x7fffffff;
      if (size > 0x7f800000) continue;
      counts[size >>> 15]!++;
      total++;
    }
  }
  let left = Math.ceil(total * q);
  let bin = 0;
  while (bin < counts.length - 1 && (left -= counts[bin]!) > 0) bin++;
  return new Float32Array(new Uint32Array([(bin + 1) << 15]).buffer)[0]!;
}

/** Bits. */
export function entropy(row: Float32Array): number {
  return -row.reduce((total, p) => (p > 0 ? total + p * Math.log2(p) : total), 0);
}

// A probability of 0 in B would make the divergence infinite for a key that A gives next to nothing.
const FLOOR = 1e-12;

/** KL(a || b) in nats, of rows that are brought to a sum of 1. */
export function divergence(a: Float32Array, b: Float32Array): number {
  const [sumA, sumB] = [sum(a), sum(b)];
  return a.reduce((total, value, key) => {
    const p = value / sumA;
    return p > 0 ? total + p * Math.log(p / Math.max(b[key]! / sumB, FLOOR)) : total;
  }, 0);
}

/** Half the sum of the absolute differences, in 0..1. */
export function totalVariation(a: Float32Array, b: Float32Array): number {
  return a.reduce((total, value, key) => total + Math.abs(value - b[key]!) / 2, 0);
}

/** The fewest patches that hold `share` of the patches' mass, as a mask. */
export function heaviest(patches: Float32Array, share: number): Uint8Array {
  const order = Array.from(patches.keys()).sort((a, b) => patches[b]! - patches[a]!);
  const mask = new Uint8Array(patches.length);
  let left = share * sum(patches);
  for (const patch of order) {
    if (left <= 0) break;
    mask[patch] = 1;
    left -= patches[patch]!;
  }
  return mask;
}

/** The edges between patches inside and outside of a mask, as lines [x0, y0, x1, y1] in patches. */
export function outline(mask: Uint8Array, [rows, columns]: [number, number]): number[][] {
  const inside = (row: number, column: number) =>
    row >= 0 && column >= 0 && row < rows && column < columns && mask[row * columns + column] === 1;
  const lines: number[][] = [];
  for (let row = 0; row <= rows; row++) {
    for (let column = 0; column <= columns; column++) {
      if (inside(row, column) !== inside(row - 1, column)) lines.push([column, row, column + 1, row]);
      if (inside(row, column) !== inside(row, column - 1)) lines.push([column, row, column, row + 1]);
    }
  }
  return lines;
}

/** 0.0123 as people read it. */
export function format(value: number): string {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 0.001 && size < 1000 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

export function percent(share: number): string {
  return `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)} %`;
}
