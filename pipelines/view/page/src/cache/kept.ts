/** Values that are made once and kept for a while. */

const ABSENT_MS = 2000; // one look at a growing cache asks for the same file many times, the next look asks anew

interface Entry<Value> {
  value: Promise<Value>;
  size: number;
}

/** Promises by their keys. Those used longest ago are forgotten once the sizes of all are more than `limit`.
 *
 * Failures are forgotten at once, so that a broken connection can be tried again. So is null, which says that something
 * is not there, two seconds later: a growing cache may have it then. */
export class Kept<Key, Value> {
  private readonly entries = new Map<Key, Entry<Value>>();
  private total = 0;

  constructor(private readonly limit = Infinity) {}

  /** The value of `key`, made if it is not there. `size` is in the unit of `limit`. */
  get(key: Key, make: () => Promise<Value>, size = 1): Promise<Value> {
    const found = this.entries.get(key);
    if (found !== undefined) {
      this.entries.delete(key); // and behind all others, as the one used last
      this.entries.set(key, found);
      return found.value;
    }
    const entry = { value: make(), size };
    this.entries.set(key, entry);
    this.total += size;
    const forget = () => this.forget(key, entry);
    entry.value.then((value) => value === null && setTimeout(forget, ABSENT_MS), forget);
    for (const [oldest, { size: freed }] of this.entries) {
      if (this.total <= this.limit || oldest === key) break;
      this.entries.delete(oldest);
      this.total -= freed;
    }
    return entry.value;
  }

  /** `entry`, if it is still the one of `key`. */
  private forget(key: Key, entry: Entry<Value>): void {
    if (this.entries.get(key) !== entry) return;
    this.entries.delete(key);
    this.total -= entry.size;
  }
}
