"""Files on this machine or on a server: read any part of them, and write them completely or not at all.

- `location`: a local path or a URL, and how to tell the two apart
- `ranges`: read part of a file, or all of it, on this machine or on a server
- `durable`: write a file completely or not at all
- `writers`: lock a folder, so that it has one writer at a time; remove what a killed one left
- `spool`: folders for files on their way to an object store
- `sizes`: sizes as people read them
- `remote/`: files on servers, fetched in blocks that are kept on the local disk
"""
