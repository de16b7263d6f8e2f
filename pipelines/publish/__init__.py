"""Publish: put a cache in a dataset repository of a Hugging Face hub, and fetch one, or a part of it, from a server.

- `config`: the options of push and pull
- `push`: send a cache to a hub, what makes it a cache last
- `files`: which files of a folder are the cache's
- `compare`: whether two caches are the same, or one is an earlier state of the other
- `repository`: what is in a repository, and whether a cache may be put there
- `card`: the page that says what a published cache is
- `pull`: fetch a cache from a server
- `chosen`: the blocks and views that a pull takes, as a cache of their own
"""
