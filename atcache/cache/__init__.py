"""An opened cache: what it records about itself, and its maps and factors as lazy arrays.

- `cache`: what `atcache.open` returns
- `decoded`: what it gives of a view, and of one layer of all views
- `identity`: what two builds must have in common to make the same cache
- `record`: what a cache records about itself, read and written in one place
- `coders`: make the coder that decodes a cache
- `lazy_layers`: one layer of a cache as an array that decodes only what is sliced
- `stacking`: stack the samples of a batch, in shared memory where there is any
- `slots`: memory that worker processes share with the process that started them
- `differences`: say in words how two records differ
"""
