/** The decoded maps of one view, inside the worker. A layer is decoded when it is first needed. */

import { multiply, makePanels } from "../codecs/products";
import type { Layer, Shape } from "../codecs/layers";
import type { Statistics } from "./types";

/** What a codec makes of a view's codes. `layer` may take long: it lets other work in between, and gives up with an
 * AbortError once nobody wants it any more. */
export interface LayerSource {
  layer(position: number, isWanted: () => boolean): Promise<Layer>;
  /** Start to fetch what a layer is made of. */
  prefetch(position: number): void;
}

/** A request of the page, which may take it back. */
export interface Task {
  isCancelled: boolean;
}

interface PendingLayer {
  layer: Promise<Layer>;
  /** Who waits for it; null once it is there. */
  tasks: Task[] | null;
}

const NUM_AHEAD = 3; // layers whose codes are fetched while others are decoded

export type RolloutKind = "mean" | "max";

export class DecodedView {
  private readonly layers = new Map<number, PendingLayer>();
  private joined: { kind: RolloutKind; maps: Float32Array[] } | null = null;
  private first = 0;

  constructor(
    private readonly source: LayerSource,
    private readonly shape: Shape,
    private readonly numLayers: number,
  ) {}

  /** The layer that the wall and others begin with. */
  prefer(position: number): void {
    this.first = position;
  }

  async row(position: number, head: number, queries: number[]): Promise<Float32Array> {
    this.check(queries, position, head);
    return meanRow(await this.layer(position), head, queries, this.shape.numTokens);
  }

  /** (layer, head, key). `onLayer` gets a copy of each layer's part. */
  async wall(queries: number[], onLayer: (position: number, rows: Float32Array) => void): Promise<Float32Array> {
    this.check(queries);
    const { numHeads, numTokens } = this.shape;
    const size = numHeads * numTokens;
    const wall = new Float32Array(this.numLayers * size);
    for await (const [position, layer] of this.all()) {
      for (let head = 0; head < numHeads; head++) {
        const start = position * size + head * numTokens;
        const row = wall.subarray(start, start + numTokens);
        for (const query of queries) layer.addRow(head, query, 1 / queries.length, row);
      }
      onLayer(position, wall.slice(position * size, (position + 1) * size));
    }
    return wall;
  }

  async map(position: number, head: number): Promise<Float32Array> {
    this.check([0], position, head);
    return (await this.layer(position)).map(head);
  }

  /** Abnar and Zuidema 2020 (arXiv 2005.00928), section 3: half of what a token passes on is its own, so each layer's
   * matrix is A / 2 + I / 2; the product of all of them, of which only the queries' rows are computed. */
  async rollout(kind: RolloutKind, queries: number[]): Promise<Float32Array> {
    this.check(queries);
    const { numTokens, numQueries } = this.shape;
    if (numQueries !== numTokens) {
      throw new RangeError("a rollout needs the rows of all tokens, and the cache stores only some");
    }
    const maps = await this.joinedMaps(kind);
    let row: Float32Array = new Float32Array(numTokens);
    for (const query of queries) row[query] += 1 / queries.length;
    for (const map of [...maps].reverse()) {
      const passed = multiply(row, 1, makePanels(map, numTokens, numTokens, numTokens, 1));
      for (let key = 0; key < numTokens; key++) passed[key] = (passed[key] + row[key]) / 2;
      row = passed;
    }
    return row;
  }

  async statistics(numPrefix: number): Promise<Statistics> {
    const { numHeads, numQueries, numTokens } = this.shape;
    const entropy = new Float32Array(this.numLayers * numHeads);
    const clsMass = new Float32Array(this.numLayers * numHeads);
    for await (const [position, layer] of this.all()) {
      for (let head = 0; head < numHeads; head++) {
        const map = layer.map(head);
        let bits = 0;
        let mass = 0;
        for (let at = 0; at < map.length; at++) if (map[at] > 0) bits -= map[at] * Math.log2(map[at]);
        if (numPrefix) for (let query = 0; query < numQueries; query++) mass += map[query * numTokens];
        entropy[position * numHeads + head] = bits / numQueries;
        clsMass[position * numHeads + head] = mass / numQueries;
      }
    }
    return { entropy, clsMass };
  }

  /** Each layer's heads joined, rows summing to 1; kept for the last kind that was asked for. */
  private async joinedMaps(kind: RolloutKind): Promise<Float32Array[]> {
    if (this.joined?.kind === kind) return this.joined.maps;
    const { numHeads, numTokens } = this.shape;
    const maps = new Array<Float32Array>(this.numLayers);
    for await (const [position, layer] of this.all()) {
      const sum = layer.map(0);
      for (let head = 1; head < numHeads; head++) {
        const map = layer.map(head);
        for (let at = 0; at < sum.length; at++) {
          if (kind === "mean") sum[at] += map[at];
          else if (map[at] > sum[at]) sum[at] = map[at];
        }
      }
      for (let start = 0; start < sum.length; start += numTokens) {
        let total = 0;
        for (let key = 0; key < numTokens; key++) total += sum[start + key];
        for (let key = 0; key < numTokens; key++) sum[start + key] /= total;
      }
      maps[position] = sum;
    }
    this.joined = { kind, maps };
    return maps;
  }

  /** A layer, decoded once. It goes on while any task that asked for it does. */
  layer(position: number, task: Task = { isCancelled: false }): Promise<Layer> {
    const found = this.layers.get(position);
    found?.tasks?.push(task);
    if (found !== undefined) return found.layer;
    const tasks = [task];
    const layer = this.source.layer(position, () => tasks.some(({ isCancelled }) => !isCancelled));
    const pending: PendingLayer = { layer, tasks };
    this.layers.set(position, pending);
    layer.then(
      () => (pending.tasks = null),
      () => this.layers.delete(position),
    );
    return layer;
  }

  /** All layers, the preferred one first. While one is worked on, the next is on its way. */
  private async *all(): AsyncGenerator<[number, Layer]> {
    const positions = Array.from({ length: this.numLayers }, (_, position) => position);
    const order = [this.first, ...positions.filter((position) => position !== this.first)];
    for (const [at, position] of order.entries()) {
      for (const next of order.slice(at + 1, at + 1 + NUM_AHEAD)) if (!this.layers.has(next)) this.source.prefetch(next);
      yield [position, await this.layer(position)];
      await breathe();
    }
  }

  private check(queries: number[], position = 0, head = 0): void {
    const isIndex = (value: number, length: number): boolean => Number.isInteger(value) && value >= 0 && value < length;
    const { numQueries, numHeads } = this.shape;
    const fits = queries.length > 0 && queries.every((query) => isIndex(query, numQueries));
    if (!fits || !isIndex(position, this.numLayers) || !isIndex(head, numHeads)) {
      throw new RangeError(
        `layer ${position}, head ${head}, queries ${queries.join(", ")}: there are ${this.numLayers} layers of ` +
          `${numHeads} heads, and rows of the first ${numQueries} tokens`,
      );
    }
  }
}

function meanRow(layer: Layer, head: number, queries: number[], numTokens: number): Float32Array {
  const row = new Float32Array(numTokens);
  for (const query of queries) layer.addRow(head, query, 1 / queries.length, row);
  return row;
}

const channel = new MessageChannel();
const waiting: (() => void)[] = [];
channel.port1.onmessage = () => waiting.shift()?.();

/** Lets messages in that have come meanwhile: what a user wants now is not kept waiting by a wall under way. */
export function breathe(): Promise<void> {
  return new Promise((resolve) => {
    waiting.push(resolve);
    channel.port2.postMessage(null);
  });
}
