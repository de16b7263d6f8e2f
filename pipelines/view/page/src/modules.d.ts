/** A module compiled from AssemblyScript: its bytes in base64. See `compileWasm` in vite.config.ts. */
declare module "*?wasm" {
  const base64: string;
  export default base64;
}
