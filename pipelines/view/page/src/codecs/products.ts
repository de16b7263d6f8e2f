/** Products of matrices, in WebAssembly. All are row-major Float32Arrays. */

import wasmBase64 from "../wasm/products.ts?wasm";

const ROWS = 4;
const COLUMNS = 8;
const PAGE_NBYTES = 65536;

/** A right factor, (depth, columns), in the order that the product reads it: (panel, depth, 8 columns). */
export interface Panels {
  depth: number;
  columns: number;
  data: Float32Array;
}

/** Panels of a matrix whose element (depth, column) is `source[depth * depthStride + column * columnStride]`. */
export function makePanels(
  source: ArrayLike<number>,
  depth: number,
  columns: number,
  depthStride: number,
  columnStride: number,
): Panels {
  const data = new Float32Array(Math.ceil(columns / COLUMNS) * COLUMNS * depth);
  for (let start = 0, at = 0; start < columns; start += COLUMNS) {
    const width = Math.min(COLUMNS, columns - start);
    for (let row = 0; row < depth; row++, at += COLUMNS) {
      let from = row * depthStride + start * columnStride;
      for (let column = 0; column < width; column++, from += columnStride) data[at + column] = source[from];
    }
  }
  return { depth, columns, data };
}

interface Exports {
  multiplyAdd(left: number, right: number, sum: number, rows: number, depth: number, numPanels: number): void;
}

const memory = new WebAssembly.Memory({ initial: 16, maximum: 65536 });
let exports: Exports | null = null;

function load(): Exports {
  const bytes = Uint8Array.from(atob(wasmBase64), (character) => character.charCodeAt(0));
  const env = { memory, abort: () => {} };
  return new WebAssembly.Instance(new WebAssembly.Module(bytes), { env }).exports as unknown as Exports;
}

/** left (rows, depth) times right, (rows, columns), added to `addend` if one is given. A new array.
 *
 * Operands are copied into the module's memory: that costs little beside the product, and nothing is to be freed.
 */
export function multiply(left: Float32Array, rows: number, right: Panels, addend?: Float32Array): Float32Array {
  exports ??= load();
  const { depth, columns } = right;
  const numPanels = Math.ceil(columns / COLUMNS);
  const paddedRows = Math.ceil(rows / ROWS) * ROWS;
  const width = numPanels * COLUMNS;
  const rightStart = 1024; // AssemblyScript keeps nothing there, but 0 would look like a null address
  const leftStart = rightStart + 4 * right.data.length;
  const sumStart = leftStart + 4 * paddedRows * depth;
  const end = sumStart + 4 * paddedRows * width;
  if (end > memory.buffer.byteLength) memory.grow(Math.ceil((end - memory.buffer.byteLength) / PAGE_NBYTES));
  const floats = new Float32Array(memory.buffer);
  floats.set(right.data, rightStart / 4);
  floats.set(left.subarray(0, rows * depth), leftStart / 4);
  const sum = floats.subarray(sumStart / 4, end / 4);
  if (addend === undefined) sum.fill(0);
  else for (let row = 0; row < rows; row++) sum.set(addend.subarray(row * columns, (row + 1) * columns), row * width);
  exports.multiplyAdd(leftStart, rightStart, sumStart, paddedRows, depth, numPanels);
  const result = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row++) result.set(sum.subarray(row * width, row * width + columns), row * columns);
  return result;
}
