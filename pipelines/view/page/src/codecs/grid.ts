/** The inverse DCT-II over the patch grid. */

import { makePanels, multiply } from "./products";

export interface GridTokens {
  numPrefix: number;
  gridHeight: number;
  gridWidth: number;
}

/** Tokens (token, width) from coefficients of the same shape; `order` says which frequency each one is. */
export function undoDct(
  coefficients: Float32Array,
  width: number,
  tokens: GridTokens,
  order: Int32Array,
): Float32Array {
  const { numPrefix, gridHeight, gridWidth } = tokens;
  const start = numPrefix * width;
  const grid = new Float32Array(gridHeight * gridWidth * width); // (frequency row, frequency column, component)
  for (let at = 0; at < order.length; at++) {
    const from = start + at * width;
    grid.set(coefficients.subarray(from, from + width), order[at] * width);
  }
  // Over rows all columns and components are one axis; over columns each row of the image is a product of its own.
  const columnsWidth = gridWidth * width;
  const overRows = multiply(
    cosines(gridHeight),
    gridHeight,
    makePanels(grid, gridHeight, columnsWidth, columnsWidth, 1),
  );
  const result = new Float32Array(coefficients.length);
  result.set(coefficients.subarray(0, start));
  const columnCosines = cosines(gridWidth);
  for (let row = 0; row < gridHeight; row++) {
    const line = overRows.subarray(row * columnsWidth, (row + 1) * columnsWidth);
    const patches = multiply(columnCosines, gridWidth, makePanels(line, gridWidth, width, width, 1));
    result.set(patches, start + row * columnsWidth);
  }
  return result;
}

/** (place, frequency): the transposed matrix of the orthonormal DCT-II. */
function cosines(size: number): Float32Array {
  const matrix = new Float32Array(size * size);
  for (let place = 0; place < size; place++) {
    for (let frequency = 0; frequency < size; frequency++) {
      const scale = Math.sqrt((frequency === 0 ? 1 : 2) / size);
      matrix[place * size + frequency] = scale * Math.cos((Math.PI / size) * (place + 0.5) * frequency);
    }
  }
  return matrix;
}
