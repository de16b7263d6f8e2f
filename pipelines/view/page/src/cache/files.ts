/** A cache's files: on a server, or carried by the page itself. All requests go through here and are counted. */

import { CacheError } from "./types";

export interface Files {
  /** How the files are named to users. */
  readonly place: string;
  readonly fetched: { bytes: number; requests: number };
  /** A whole file of at most `maxNbytes`; null if there is none. */
  read(path: string, maxNbytes: number): Promise<Uint8Array<ArrayBuffer> | null>;
  /** `nbytes` bytes from `offset`. */
  readRange(path: string, offset: number, nbytes: number): Promise<Uint8Array<ArrayBuffer>>;
  /** The last `nbytes` bytes and the size of the file; null if there is none. */
  readEnd(path: string, nbytes: number): Promise<{ bytes: Uint8Array<ArrayBuffer>; size: number } | null>;
}

/** S3 answers 403 for a key that is not there to those who may not list. */
const MISSING = [403, 404, 410];

export class WebFiles implements Files {
  /** Whether `Range: bytes=-N` works. Azure ignores it, and it needs CORS's permission, which `bytes=A-B` does not. */
  private takesSuffixes = true;

  /** `place` is an absolute URL that ends in "/". */
  constructor(
    readonly place: string,
    readonly fetched = { bytes: 0, requests: 0 },
  ) {}

  async read(path: string, maxNbytes: number): Promise<Uint8Array<ArrayBuffer> | null> {
    const response = await this.request(path);
    return response && this.body(response, path, maxNbytes);
  }

  async readRange(path: string, offset: number, nbytes: number): Promise<Uint8Array<ArrayBuffer>> {
    const range = `bytes=${offset}-${offset + nbytes - 1}`;
    const response = await this.request(path, { headers: { Range: range } });
    if (response === null) throw missing(this.place, path);
    this.checkPart(response, path);
    const bytes = await this.body(response, path, nbytes);
    if (bytes.length !== nbytes) throw damaged(this.place, path, `it ends before byte ${offset + nbytes}`);
    return bytes;
  }

  async readEnd(
    path: string,
    nbytes: number,
  ): Promise<{ bytes: Uint8Array<ArrayBuffer>; size: number } | null> {
    if (this.takesSuffixes) {
      const response = await this.request(path, { headers: { Range: `bytes=-${nbytes}` } }).catch((error: unknown) => {
        if (error instanceof CacheError && error.kind === "no-cors") return undefined;
        throw error;
      });
      if (response === null) return null;
      // Without a readable Content-Range a shard's size is not known, and its index cannot be checked.
      const size = Number(/\/(\d+)$/.exec(response?.headers.get("Content-Range") ?? "")?.[1] ?? NaN);
      if (response?.status === 206 && size >= 0) {
        const bytes = await this.body(response, path, nbytes);
        if (bytes.length !== Math.min(nbytes, size)) throw damaged(this.place, path, "its end did not come whole");
        return { bytes, size };
      }
      await response?.body?.cancel();
      this.takesSuffixes = false;
    }
    const head = await this.request(path, { method: "HEAD" });
    if (head === null) return null;
    const size = Number(head.headers.get("Content-Length") ?? NaN);
    if (!(size >= 0)) throw noRanges(this.place, "does not say how large a file is");
    const length = Math.min(nbytes, size);
    return { bytes: length ? await this.readRange(path, size - length, length) : new Uint8Array(0), size };
  }

  /** The answer, or null if there is no such file. */
  private async request(path: string, init: RequestInit = {}): Promise<Response | null> {
    const url = new URL(path.split("/").map(encodeURIComponent).join("/"), this.place).href;
    this.fetched.requests++;
    let response: Response;
    try {
      response = await fetch(url, init);
    } catch {
      throw await this.whyUnreadable(url);
    }
    if (response.ok) return response;
    await response.body?.cancel();
    if (MISSING.includes(response.status)) return null;
    throw new CacheError("network", `${url}: the server answers ${response.status} ${response.statusText}.`.trim());
  }

  /** A browser hides why a request failed. If the server answers a request whose answer nobody may read, it is CORS. */
  private async whyUnreadable(url: string): Promise<CacheError> {
    const isAlive = await fetch(url, { mode: "no-cors", method: "HEAD" }).then(
      () => true,
      () => false,
    );
    if (!isAlive) return new CacheError("network", `${new URL(url).host} cannot be reached. Is the server running?`);
    return new CacheError(
      "no-cors",
      `${new URL(url).host} does not let this page read its files. Its CORS rules must allow GET and HEAD with the ` +
        `header Range from ${location.origin}, and expose Content-Length and Content-Range.`,
    );
  }

  private checkPart(response: Response, path: string): void {
    if (response.status === 206) return;
    void response.body?.cancel();
    throw noRanges(this.place, `sends the whole of ${path} where a part was asked for`);
  }

  /** The body, counted; given up once it is longer than it may be. */
  private async body(response: Response, path: string, maxNbytes: number): Promise<Uint8Array<ArrayBuffer>> {
    try {
      const bytes = await collect(response.body, maxNbytes, (nbytes) => (this.fetched.bytes += nbytes));
      if (bytes === null) throw damaged(this.place, path, `it has more than the ${maxNbytes} bytes expected`);
      return bytes;
    } catch (error) {
      if (error instanceof CacheError) throw error;
      throw new CacheError("network", `${this.place}${path}: the connection broke off.`);
    }
  }
}

/** Files that the page carries, as in `--export page.html`. */
export class BlobFiles implements Files {
  readonly fetched = { bytes: 0, requests: 0 };

  constructor(
    readonly place: string,
    private readonly blobs: ReadonlyMap<string, Blob>,
  ) {}

  async read(path: string): Promise<Uint8Array<ArrayBuffer> | null> {
    const blob = this.blobs.get(path);
    return blob ? new Uint8Array(await blob.arrayBuffer()) : null;
  }

  async readRange(path: string, offset: number, nbytes: number): Promise<Uint8Array<ArrayBuffer>> {
    const blob = this.blobs.get(path);
    if (blob === undefined) throw missing(this.place, path);
    const bytes = new Uint8Array(await blob.slice(offset, offset + nbytes).arrayBuffer());
    if (bytes.length !== nbytes) throw damaged(this.place, path, `it ends before byte ${offset + nbytes}`);
    return bytes;
  }

  async readEnd(
    path: string,
    nbytes: number,
  ): Promise<{ bytes: Uint8Array<ArrayBuffer>; size: number } | null> {
    const blob = this.blobs.get(path);
    if (blob === undefined) return null;
    const bytes = new Uint8Array(await blob.slice(Math.max(0, blob.size - nbytes)).arrayBuffer());
    return { bytes, size: blob.size };
  }
}

/** All bytes of a stream; null if there are more than `maxNbytes`. */
export async function collect(
  stream: ReadableStream<Uint8Array> | null,
  maxNbytes: number,
  count: (nbytes: number) => void = () => {},
): Promise<Uint8Array<ArrayBuffer> | null> {
  const pieces: Uint8Array[] = [];
  let total = 0;
  const reader = stream?.getReader();
  for (let read = await reader?.read(); read && !read.done; read = await reader?.read()) {
    count(read.value.length);
    total += read.value.length;
    if (total > maxNbytes) {
      await reader?.cancel();
      return null;
    }
    pieces.push(read.value);
  }
  const whole = new Uint8Array(total);
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

export function damaged(place: string, path: string, why: string): CacheError {
  return new CacheError("damaged", `${place}${path} is damaged: ${why}. Run \`atcache verify\` on the cache.`);
}

export function missing(place: string, path: string): CacheError {
  return new CacheError("missing", `${place}${path} is not there. The cache was not copied whole, or is being replaced.`);
}

function noRanges(place: string, what: string): CacheError {
  return new CacheError(
    "no-ranges",
    `The server of ${place} ${what}. Use one that answers range requests (\`atcache view\`, nginx, S3; not ` +
      "`python -m http.server`).",
  );
}
