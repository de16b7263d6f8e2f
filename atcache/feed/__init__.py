"""Batches for training and validation: which samples, in which order, and who reads them.

- `loader`: batches of a run, from any step on
- `batch`: what one step takes
- `order`: the order of samples, and all else that a seed decides
- `sample_views`: where the pixels and codes of a sample come from
- `caches`: open the caches that a student learns from, one or several
- `workers`: make batches ahead in other processes
"""
