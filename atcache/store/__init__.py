"""The only part of atcache that knows Zarr: layout, writer, commit records, reader."""
