"""Codecs: turn factors into integers of fixed shape, and back. One codec a file; no codec knows Zarr.

- `base`: what every codec is: a config that fits its state and makes coders
- `registry`: codecs by name
- `exact`: the factors themselves, as float16 or float32
- `int8`: one scale for each token and head, integers of 8 bits
- `transform/`: the default: factors in a basis that is fitted to the teacher
- `logmap`: the maps themselves, in a few logarithmic levels, for teachers whose maps have no factors
- `fidelity`: how far decoded maps are from the teacher's
- `search`: find the step size that meets a target
"""
