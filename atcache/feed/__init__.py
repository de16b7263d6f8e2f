"""Batches for training and validation: which samples, in which order, and which processes read them.

- `loader`: the batches of a run, beginning at any step
- `batch`: what one step takes
- `prefetch`: copies to a GPU while the step before runs
- `classes`: how many classes there are, and labels that must be wrong
- `order`: the order of samples, and everything else that a seed decides
- `sample_views`: where the pixels and codes of a sample come from
- `corrupted`: views with a common corruption, for evaluation
- `beside`: codes of other teachers, for loops with several
- `caches`: open the caches that a student learns from, one or several
- `workers`: make batches in advance in other processes
- `messages`: how these hand a batch over
"""
