/** Codec `transform`: layers predicted from the layers below. docs/format/transform.md says what each step is. */

import { undoDct, type GridTokens } from "./grid";
import { FactorLayer, type Shape } from "./layers";
import { frequencyBands, Packing, readComponents, readEscapes } from "./packing";
import { makePanels, multiply, type Panels } from "./products";
import { project, projectionPanels, type Projection } from "./projection";
import type { StateArray } from "./state";

const MAX_KEPT_NBYTES = 2 ** 27;

export interface TransformFields {
  dct: boolean;
  predict: boolean;
}

/** What all views of a cache are decoded with. */
export class TransformDecoder {
  readonly packing: Packing;
  readonly projection: Projection = new Map();
  readonly width: number;
  private readonly order: Int32Array;
  private readonly kept = new Map<string, Panels>();
  private readonly mayKeep: boolean;

  constructor(
    private readonly fields: TransformFields,
    private readonly state: Map<string, StateArray>,
    private readonly tokens: GridTokens,
    private readonly shape: Shape,
    private readonly bias: (position: number) => Float32Array | null,
  ) {
    const { bands, order } = frequencyBands(tokens, fields.dct);
    const bucket = this.array("bucket_LBJ");
    this.packing = new Packing(bucket.bytes, bucket.shape, bands, shape.numTokens);
    this.order = order;
    this.width = this.array("basis_LJC").shape[2];
    for (const [name, array] of state) {
      if (name.startsWith("projection_")) this.projection.set(name.slice("projection_".length), array);
    }
    const numOutputs = this.projection.get("weight_NC")?.shape[1] ?? 0;
    this.mayKeep = 4 * bucket.shape[0] * this.width * (2 * this.width + numOutputs) <= MAX_KEPT_NBYTES;
  }

  open(rows: Uint8Array): TransformChain {
    return new TransformChain(this, rows);
  }

  /** The coefficients of a layer, (coefficient, width), from those of the layer below. */
  coefficients(components: Float32Array, position: number, below: Float32Array | null): Float32Array {
    const { width, shape } = this;
    let sum: Float32Array | undefined;
    if (below !== null && this.fields.predict) {
      sum = multiply(below, shape.numTokens, this.panels(`prediction ${position}`, () => this.prediction(position)));
    }
    const basis = this.panels(`basis ${position}`, () => {
      const depth = this.packing.numComponents[position];
      return makePanels(this.array("basis_LJC").floats(position), depth, width, width, 1);
    });
    return multiply(components, shape.numTokens, basis, sum);
  }

  private prediction(position: number): Panels {
    const { width } = this;
    const prediction = this.array("prediction_LCC").floats(position);
    const scale = this.array("prediction_scale_LC").floats(position);
    for (let from = 0; from < prediction.length; from += width) {
      for (let column = 0; column < width; column++) prediction[from + column] *= scale[column];
    }
    return makePanels(prediction, width, width, width, 1);
  }

  /** q and k of a layer from its coefficients. */
  layer(coefficients: Float32Array, position: number): FactorLayer {
    const { width, shape, tokens } = this;
    const mean = this.meanPanels(position);
    const left = this.array("mean_left_LTR").floats(position);
    const values = this.fields.dct ? undoDct(coefficients, width, tokens, this.order) : coefficients;
    const x = multiply(left, shape.numTokens, mean, values);
    const weight = this.projection.get("weight_NC");
    const panels =
      weight && this.panels(`projection ${position}`, () => projectionPanels(weight.floats(position), width));
    const [q, k] = project(x, width, panels ?? null, this.projection, position, shape);
    return new FactorLayer(shape, q, k, this.bias(position));
  }

  shrink(position: number): Float32Array {
    return this.array("shrink_L3").floats(position);
  }

  private meanPanels(position: number): Panels {
    const right = this.array("mean_right_LRC");
    return makePanels(right.floats(position), right.shape[1], this.width, this.width, 1);
  }

  /** A layer's right factor: made once, unless all layers' together are too large to keep. */
  private panels(name: string, make: () => Panels): Panels {
    const found = this.kept.get(name) ?? make();
    if (this.mayKeep) this.kept.set(name, found);
    return found;
  }

  private array(name: string): StateArray {
    return this.state.get(name)!; // the cache was refused if it has no such array
  }
}

/** One view. Each layer needs the coefficients of all layers below it, but their q and k only if they are shown. */
export class TransformChain {
  /** Coefficients of the layers whose q and k were not asked for yet. */
  private readonly coefficients = new Map<number, Float32Array>();
  private readonly escapes: number[][];
  private below: Float32Array | null = null;
  private numDone = 0;

  constructor(
    private readonly decoder: TransformDecoder,
    private readonly rows: Uint8Array,
  ) {
    const width = rows.length / 2;
    if (decoder.packing.nbytes > width) throw new RangeError("its rows of bytes are too short for its cells");
    this.escapes = readEscapes(rows.subarray(width), decoder.packing);
  }

  /** Steps until this layer's coefficients are there. */
  stepsTo(position: number): number {
    return Math.max(0, position + 1 - this.numDone);
  }

  /** Decode the coefficients of the next layer. */
  step(): void {
    const position = this.numDone;
    const { packing } = this.decoder;
    const cells = this.rows.subarray(0, this.rows.length / 2);
    const shrink = this.decoder.shrink(position);
    const components = readComponents(cells, this.escapes[position], position, packing, shrink);
    this.below = this.decoder.coefficients(components, position, this.below);
    this.coefficients.set(position, this.below);
    this.numDone++;
  }

  /** The layer at `position`, once its coefficients are there. Give it out once: they are forgotten. */
  take(position: number): FactorLayer {
    const coefficients = this.coefficients.get(position)!;
    this.coefficients.delete(position);
    return this.decoder.layer(coefficients, position);
  }
}
