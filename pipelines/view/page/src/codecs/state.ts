/** Arrays of `attention/state`, kept as they are stored and turned into floats a layer at a time. */

import { halvesToFloats } from "./halves";

export const STATE_DTYPES = { float32: 4, float16: 2, int32: 4, int8: 1, uint8: 1 } as const;
export type StateDtype = keyof typeof STATE_DTYPES;

export class StateArray {
  /** `bytes` are the elements in C order, little-endian; the first axis is the layer. */
  constructor(
    readonly bytes: Uint8Array<ArrayBuffer>,
    readonly shape: number[],
    readonly dtype: StateDtype,
  ) {}

  /** One layer's elements. */
  floats(position: number): Float32Array {
    const count = this.shape.slice(1).reduce((product, side) => product * side, 1);
    const size = STATE_DTYPES[this.dtype];
    const from = position * count * size;
    const bytes = this.bytes.slice(from, from + count * size); // a copy, so that its elements are aligned
    switch (this.dtype) {
      case "float32":
        return new Float32Array(bytes.buffer);
      case "float16":
        return halvesToFloats(new Uint16Array(bytes.buffer));
      case "int32":
        return Float32Array.from(new Int32Array(bytes.buffer));
      case "int8":
        return Float32Array.from(new Int8Array(bytes.buffer));
      case "uint8":
        return Float32Array.from(bytes);
    }
  }
}
