"""Files of servers: read in ranges, and kept as blocks in a local folder of limited size.

- `remote_file`: a file of a server that is read at any place
- `block_cache`: the blocks on the local disk, which all processes share
- `claims`: only one process at a time fetches a block
- `fetcher`: ask a server for bytes
- `fetch_process`: the process of its own that talks to the servers
"""
