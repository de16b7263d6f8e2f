"""Where bytes lie, on this machine or on a server: reading at any place, and writing files that are whole or absent.

- `location`: a path of this machine or a URL of a server, and telling the two apart
- `ranges`: read part of a file, or all of it, wherever it lies
- `durable`: write a file whole or not at all; one writer at a time in a folder
- `remote/`: files of servers, fetched in blocks that are kept on the local disk
"""
