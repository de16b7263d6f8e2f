"""An opened cache: what it records about itself, and its maps and factors as lazy arrays.

- `cache`: what `atcache.open` returns
- `decoded`: what it gives of a view, and of one layer of all views
- `shown`: how it shows itself in a notebook
- `identity`: what two builds must have in common to make the same cache
- `record`: what a cache records about itself, read and written in one place
- `coders`: make the coder that decodes a cache
- `lazy_layers`: layers of a cache as an array that decodes only what is sliced
- `lazy_array`: the same as a dask array
- `labelled`: these with named axes and coordinates, as an xarray dataset
- `xarray_engine`: how `xr.open_dataset` finds and opens a cache
- `stacking`: stack the samples of a batch, in shared memory where there is any
- `slots`: memory that worker processes share with the process that started them
- `differences`: say in words how two records differ
"""
