import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import assemblyscript from "assemblyscript/asc";
import { defineConfig, type Plugin } from "vite";

const here = import.meta.dirname;

/** `import wasm from "./products.ts?wasm"` gives a module's bytes in base64: no file to fetch, and no address to find it
 * by from a worker that has none itself. */
function compileWasm(): Plugin {
  return {
    name: "compile-wasm",
    enforce: "pre",
    async load(id) {
      if (!id.endsWith("?wasm")) return null;
      const path = id.slice(0, -"?wasm".length);
      this.addWatchFile(path);
      let wasm: Uint8Array | undefined;
      const flags = ["-O3", "--noAssert", "--runtime", "stub", "--enable", "simd", "--importMemory"];
      const { error, stderr } = await assemblyscript.main(["source.ts", "--outFile", "out.wasm", ...flags], {
        readFile: (name) => (name === "source.ts" ? readFileSync(path, "utf8") : null),
        writeFile: (name, contents) => void (name === "out.wasm" && (wasm = contents as Uint8Array)),
        listFiles: () => [],
      });
      if (error || !wasm) throw new Error(`${path} does not compile: ${stderr.toString()}`);
      return `export default ${JSON.stringify(Buffer.from(wasm).toString("base64"))};`;
    },
  };
}

/** The sources' digest, the licences of what is bundled and the built files' digests, beside the page. A test computes the
 * digests again: it knows without Node when the built page is stale or was changed by hand. */
function describeBuild(): Plugin {
  let folder: string;
  return {
    name: "describe-build",
    apply: "build",
    configResolved: (config) => void (folder = config.build.outDir),
    closeBundle() {
      const read = (...parts: string[]): string => readFileSync(join(here, ...parts), "utf8");
      const numcodecs = join("node_modules", "numcodecs");
      const { version } = JSON.parse(read(numcodecs, "package.json"));
      const licences = [
        "# What is bundled in this page",
        `## numcodecs ${version}`,
        `\`\`\`text\n${read(numcodecs, "LICENSE").trim()}\n\`\`\``,
        read("licences", "numcodecs.md"), // its package does not carry these
      ];
      writeFileSync(join(folder, "THIRD_PARTY.md"), licences.join("\n\n"));
      writeFileSync(join(folder, "sources.sha256"), `${digestOfSources()}\n`);
      writeFileSync(join(folder, "built.sha256"), digestsOfBuilt(folder));
    },
  };
}

/** SHA-256 over the names and bytes of all sources, in the order of their names. */
function digestOfSources(): string {
  const digest = createHash("sha256");
  const names = namesOfFiles(here).filter((name) => !name.startsWith("node_modules/"));
  for (const name of names) digest.update(`${name}\0`).update(readFileSync(join(here, name))).update("\0");
  return digest.digest("hex");
}

/** SHA-256 of each built file but this list itself, a line each, as `sha256sum --check` takes them. */
function digestsOfBuilt(folder: string): string {
  const names = namesOfFiles(folder).filter((name) => name !== "built.sha256");
  const lines = names.map((name) => {
    const digest = createHash("sha256").update(readFileSync(join(folder, name))).digest("hex");
    return `${digest}  ${name}\n`;
  });
  return lines.join("");
}

/** Names of all files in a folder, relative to it, in order. */
function namesOfFiles(folder: string): string[] {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => relative(folder, join(entry.parentPath, entry.name)).replaceAll("\\", "/"))
    .sort();
}

export default defineConfig({
  base: "./", // the site may lie in any folder of a bucket
  plugins: [compileWasm(), describeBuild()],
  worker: { plugins: () => [compileWasm()] },
  build: {
    outDir: join(here, "../built"),
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    assetsInlineLimit: 0,
    rolldownOptions: {
      output: {
        // One script and one style sheet, with names that stay: `--export page.html` puts them into one file.
        codeSplitting: false,
        entryFileNames: "assets/page.js",
        assetFileNames: "assets/page[extname]",
      },
    },
  },
});
