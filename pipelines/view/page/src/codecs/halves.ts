/** float16 as numbers. `Float16Array` is too new for some browsers, and slower than a table. */

let table: Float32Array | null = null;

/** The value of each of the 65536 bit patterns. */
export function halfTable(): Float32Array {
  if (table !== null) return table;
  table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    let value = exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25);
    if (exponent === 31) value = fraction === 0 ? Infinity : NaN;
    table[bits] = bits & 0x8000 ? -value : value;
  }
  return table;
}

export function halvesToFloats(halves: Uint16Array): Float32Array {
  const values = halfTable();
  const floats = new Float32Array(halves.length);
  for (let at = 0; at < halves.length; at++) floats[at] = values[halves[at]];
  return floats;
}
