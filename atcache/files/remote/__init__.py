"""Files on servers: read in ranges, kept as blocks in a local folder of limited size, and stored whole.

- `remote_file`: a file on a server, of which any part can be read
- `ahead`: what is fetched in the background
- `block_cache`: the blocks on the local disk, which all processes share
- `claims`: make sure that only one process at a time fetches a block
- `hub`: where a Hugging Face hub serves its files, and which commit a branch is
- `download`: copy a file to the local disk, checked against its checksum
- `fetcher`: ask a server for bytes
- `putting`: store files on an object store, and repeat what fails
- `fetch_process`: the separate process that talks to the servers
- `web`: what it asks of web servers, with redirects and waiting
- `web_times`: the times that they name
"""
