"""Maps: a cache of a trained student's own attention.

- `config`: the options
- `run`: which views the cache gets, and the build
"""
