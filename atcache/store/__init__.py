"""The format on disk, and the only part of atcache that knows Zarr: writing, reading and checking a cache.

- `layout`: which arrays a cache has, how they are cut into shards and chunks, and which task writes what
- `shard_size`: how many samples a shard should have, and how many layers a chunk
- `writer`: create a cache, write one task at a time, finish it
- `bucket`: put a task or a new cache on an object store, safely without renames and locks
- `committed`: commit records, each checked with its shards
- `reader`: read the codes and pixels of one sample
- `manifest`: commit records, which say which tasks are done
- `records`: the files that hold commit records, one or many of them
- `metadata`: the zarr.json files of a cache, and the checksum over what they say
- `parts`: sample tables of caches in several parts
- `growth`: more views or samples for a cache that exists
- `joining`: several caches' shards as one cache
- `tables`: arrays written once: samples, the codec's state, the teacher's bias
- `chunks`: chunks and shard indexes as bytes
- `shard_file`: write one shard
- `open_shards`: shards that are open for reading, a limited number of them
- `shard_check`: check every byte of one shard
- `audit`: find what is wrong with metadata, tables and files
"""
