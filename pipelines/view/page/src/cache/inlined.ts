/** Files that the page carries itself, as `atcache view --export page.html` writes it.
 *
 * They stand in `<script type="application/json" id="inlined">`: an object from paths in the site ("caches/0/zarr.json",
 * "images/0/5") to the files' bytes in base64.
 */

let parsed: Map<string, string> | null | undefined;

function files(): Map<string, string> | null {
  if (parsed === undefined) {
    const text = document.getElementById("inlined")?.textContent ?? null;
    parsed = text === null ? null : new Map(Object.entries(JSON.parse(text) as Record<string, string>));
  }
  return parsed;
}

function asBlob(base64: string): Blob {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))]);
}

/** The files under a folder, by their paths in it; null if the page carries none there. */
export function inlinedFiles(folder: string): Map<string, Blob> | null {
  const prefix = `${folder.replace(/^\.\//, "").replace(/\/+$/, "")}/`;
  const found = [...(files() ?? [])].filter(([path]) => path.startsWith(prefix));
  if (found.length === 0) return null;
  return new Map(found.map(([path, base64]) => [path.slice(prefix.length), asBlob(base64)]));
}

/** One file of the site: carried by the page, or else fetched. Null if there is none. */
export async function siteFile(path: string): Promise<Blob | null> {
  const base64 = files()?.get(path);
  if (base64 !== undefined) return asBlob(base64);
  if (location.protocol === "file:") return null;
  const response = await fetch(new URL(path, document.baseURI)).catch(() => null);
  return response?.ok ? response.blob() : null;
}
