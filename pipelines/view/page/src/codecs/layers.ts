/** One decoded layer of one view: rows of maps, from q and k or from the maps themselves. */

import { makePanels, multiply, type Panels } from "./products";

/** What all layers of a cache have in common; the members of `geometry` in the cache's attributes. */
export interface Shape {
  numHeads: number;
  numKvHeads: number;
  headDim: number;
  numTokens: number;
  /** Rows that each map has: those of this many first tokens. */
  numQueries: number;
  scale: number;
}

export interface Layer {
  readonly nbytes: number;
  /** Adds `weight` times the row of `query` to `sum`, (key). */
  addRow(head: number, query: number, weight: number, sum: Float32Array): void;
  /** (query, key). */
  map(head: number): Float32Array;
}

/** softmax(scale * q k^T + bias). */
export class FactorLayer implements Layer {
  private readonly logits: Float32Array;

  /** q (head, token, D) and k (k's head, token, D); `bias` (1 or head, query, key) or null. */
  constructor(
    private readonly shape: Shape,
    private readonly q: Float32Array,
    private readonly k: Float32Array,
    private readonly bias: Float32Array | null,
  ) {
    this.logits = new Float32Array(shape.numTokens);
  }

  get nbytes(): number {
    return this.q.byteLength + this.k.byteLength;
  }

  addRow(head: number, query: number, weight: number, sum: Float32Array): void {
    const { numTokens, headDim, scale } = this.shape;
    const { logits, q, k } = this;
    const qStart = (head * numTokens + query) * headDim;
    let at = this.kvHead(head) * numTokens * headDim;
    const whole = headDim - (headDim % 4);
    for (let key = 0; key < numTokens; key++, at += headDim) {
      // Four sums side by side: one alone would wait for its own last addition each time.
      let [a, b, c, d] = [0, 0, 0, 0];
      for (let i = 0; i < whole; i += 4) {
        a += q[qStart + i] * k[at + i];
        b += q[qStart + i + 1] * k[at + i + 1];
        c += q[qStart + i + 2] * k[at + i + 2];
        d += q[qStart + i + 3] * k[at + i + 3];
      }
      for (let i = whole; i < headDim; i++) a += q[qStart + i] * k[at + i];
      logits[key] = (a + b + (c + d)) * scale;
    }
    this.addBias(logits, head, query, 1);
    softmaxRows(logits, 1);
    for (let key = 0; key < numTokens; key++) sum[key] += weight * logits[key];
  }

  map(head: number): Float32Array {
    const { numTokens, numQueries, headDim, scale } = this.shape;
    const size = numTokens * headDim;
    const q = this.q.subarray(head * size, (head + 1) * size);
    const logits = multiply(q, numQueries, this.keyPanels(this.kvHead(head)));
    for (let at = 0; at < logits.length; at++) logits[at] *= scale;
    this.addBias(logits, head, 0, numQueries);
    softmaxRows(logits, numQueries);
    return logits;
  }

  private keyPanels(kvHead: number): Panels {
    const { numTokens, headDim } = this.shape;
    const k = this.k.subarray(kvHead * numTokens * headDim, (kvHead + 1) * numTokens * headDim);
    return makePanels(k, headDim, numTokens, 1, headDim);
  }

  private kvHead(head: number): number {
    return Math.floor(head / (this.shape.numHeads / this.shape.numKvHeads));
  }

  private addBias(logits: Float32Array, head: number, query: number, numRows: number): void {
    if (this.bias === null) return;
    const { numTokens, numQueries } = this.shape;
    const isShared = this.bias.length === numQueries * numTokens;
    const start = ((isShared ? 0 : head) * numQueries + query) * numTokens;
    for (let at = 0; at < numRows * numTokens; at++) logits[at] += this.bias[start + at];
  }
}

/** The maps as they were stored: (head, query, key). */
export class MapLayer implements Layer {
  constructor(
    private readonly shape: Shape,
    private readonly maps: Float32Array,
  ) {}

  get nbytes(): number {
    return this.maps.byteLength;
  }

  addRow(head: number, query: number, weight: number, sum: Float32Array): void {
    const { numQueries, numTokens } = this.shape;
    const start = (head * numQueries + query) * numTokens;
    for (let key = 0; key < numTokens; key++) sum[key] += weight * this.maps[start + key];
  }

  map(head: number): Float32Array {
    const size = this.shape.numQueries * this.shape.numTokens;
    return this.maps.slice(head * size, (head + 1) * size);
  }
}

/** In place, over the rows of a matrix. */
function softmaxRows(values: Float32Array, numRows: number): void {
  const width = values.length / numRows;
  for (let start = 0; start < values.length; start += width) {
    const stop = start + width;
    let largest = -Infinity;
    for (let at = start; at < stop; at++) if (values[at] > largest) largest = values[at];
    let total = 0;
    for (let at = start; at < stop; at++) total += values[at] = Math.exp(values[at] - largest);
    for (let at = start; at < stop; at++) values[at] /= total;
  }
}

/** q (head, token, D) and k of vectors that lie (token, q's heads then k's, D), `stride` numbers a token. */
export function splitHeads(vectors: Float32Array, stride: number, shape: Shape): [Float32Array, Float32Array] {
  const { numHeads, numKvHeads, numTokens, headDim } = shape;
  const take = (first: number, count: number): Float32Array => {
    const heads = new Float32Array(count * numTokens * headDim);
    for (let head = 0, to = 0; head < count; head++) {
      for (let token = 0; token < numTokens; token++, to += headDim) {
        const from = token * stride + (first + head) * headDim;
        heads.set(vectors.subarray(from, from + headDim), to);
      }
    }
    return heads;
  };
  return [take(0, numHeads), take(numHeads, numKvHeads)];
}
