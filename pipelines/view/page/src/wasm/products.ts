// AssemblyScript, compiled to WebAssembly by ../../vite.config.ts: what plain JavaScript does ten times slower.

// All addresses are bytes in the imported memory, all matrices float32 and row-major.

/** sum (rows, 8 * num_panels) += left (rows, depth) times right (depth, 8 * num_panels).
 *
 * `right` lies in panels of 8 columns, (num_panels, depth, 8): one panel stays in the nearest cache while all rows pass
 * by. `rows` must be a multiple of 4: four rows by eight columns are the eight registers that sums are kept in.
 */
export function multiplyAdd(left: usize, right: usize, sum: usize, rows: i32, depth: i32, numPanels: i32): void {
  const leftStride = (<usize>depth) << 2;
  const sumStride = (<usize>numPanels) << 5;
  const panelNbytes = (<usize>depth) << 5;
  for (let panel = 0; panel < numPanels; panel++) {
    const panelStart = right + <usize>panel * panelNbytes;
    for (let row = 0; row < rows; row += 4) {
      const s0 = sum + <usize>row * sumStride + ((<usize>panel) << 5);
      const s1 = s0 + sumStride;
      const s2 = s1 + sumStride;
      const s3 = s2 + sumStride;
      let a0 = v128.load(s0), b0 = v128.load(s0, 16);
      let a1 = v128.load(s1), b1 = v128.load(s1, 16);
      let a2 = v128.load(s2), b2 = v128.load(s2, 16);
      let a3 = v128.load(s3), b3 = v128.load(s3, 16);
      let l0 = left + <usize>row * leftStride;
      let l1 = l0 + leftStride;
      let l2 = l1 + leftStride;
      let l3 = l2 + leftStride;
      const end = panelStart + panelNbytes;
      for (let at = panelStart; at < end; at += 32) {
        const x = v128.load(at), y = v128.load(at, 16);
        const c0 = v128.load32_splat(l0);
        a0 = f32x4.add(a0, f32x4.mul(c0, x));
        b0 = f32x4.add(b0, f32x4.mul(c0, y));
        const c1 = v128.load32_splat(l1);
        a1 = f32x4.add(a1, f32x4.mul(c1, x));
        b1 = f32x4.add(b1, f32x4.mul(c1, y));
        const c2 = v128.load32_splat(l2);
        a2 = f32x4.add(a2, f32x4.mul(c2, x));
        b2 = f32x4.add(b2, f32x4.mul(c2, y));
        const c3 = v128.load32_splat(l3);
        a3 = f32x4.add(a3, f32x4.mul(c3, x));
        b3 = f32x4.add(b3, f32x4.mul(c3, y));
        l0 += 4;
        l1 += 4;
        l2 += 4;
        l3 += 4;
      }
      v128.store(s0, a0), v128.store(s0, b0, 16);
      v128.store(s1, a1), v128.store(s1, b1, 16);
      v128.store(s2, a2), v128.store(s2, b2, 16);
      v128.store(s3, a3), v128.store(s3, b3, 16);
    }
  }
}
