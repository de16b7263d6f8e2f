"""The functions of `atcache.stats`, by what they look at.

- `arrays`: what numpy, torch and dask arrays have in common, and what each does in its own way
- `rows`: statistics of each row of a map: entropy, mass on some of its keys
- `places`: where patches are in the image: maps as images, distances
- `whole_maps`: statistics of a whole map: sink tokens, effective rank
- `between_heads`: how much the heads of a layer are alike
- `layers`: attention followed through all layers: rollout
- `agreement`: how near two sets of maps are to each other, row by row
"""
