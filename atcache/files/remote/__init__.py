"""Files on servers: read in ranges, and kept as blocks in a local folder of limited size.

- `remote_file`: a file on a server, of which any part can be read
- `block_cache`: the blocks on the local disk, which all processes share
- `claims`: make sure that only one process at a time fetches a block
- `fetcher`: ask a server for bytes
- `fetch_process`: the separate process that talks to the servers
"""
