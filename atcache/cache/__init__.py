"""An opened cache: what it says of itself, and its maps and factors as lazy arrays.

- `cache`: what `atcache.open` returns
- `identity`: what two builds must agree in to be the same cache
- `record`: what a cache says of itself, read and written in one place
- `coders`: the coder that decodes a cache
- `lazy_layers`: one layer of a cache as an array that is decoded where it is sliced
- `stacking`: stack the samples of a batch in shared memory
- `differences`: in words, how two records differ
"""
