"""Merge: make one cache of several, whose samples are parts of a dataset.

- `config`: the options of a merge
- `run`: the whole merge, from start to end
"""
