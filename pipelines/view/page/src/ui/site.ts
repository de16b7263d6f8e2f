/** Which caches this page shows: what site.json beside it offers, and what the address names. */

import { siteFile } from "../cache/inlined";
import { CacheError } from "../cache/types";
import type { State } from "./state";

export interface SiteCache {
  name: string;
  /** Address of the cache. */
  root: string;
  /** Prefix of the addresses of clean images; null if nobody serves them. */
  images: string | null;
  views: string | null;
}

/** The caches of site.json; none where there is no such file, as on a bucket. */
export async function readSite(): Promise<SiteCache[]> {
  const file = await siteFile("site.json");
  if (!file) return [];
  const site = (await file.text().then(JSON.parse).catch(() => ({}))) as { version?: unknown; caches?: Partial<SiteCache>[] };
  if (site.version !== 1 || !Array.isArray(site.caches)) {
    throw new CacheError("unknown-format", "This page does not know the version of the site.json beside it.");
  }
  return site.caches.map(({ name = "", root = "", images = null, views = null }) => ({ name, root, images, views }));
}

/** The one or two caches that the address names, or those of the site if it names none. */
export function chooseCaches(state: State, offered: SiteCache[]): SiteCache[] {
  const named = [state.cache, state.cache2].filter((name) => name !== "");
  if (!named.length) return offered.slice(0, 2);
  return named.map((name) => {
    const known = offered.find((cache) => cache.name === name);
    if (known) return known;
    const root = name.endsWith("/") ? name : `${name}/`;
    return { name, root, images: null, views: null };
  });
}
