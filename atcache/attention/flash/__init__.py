"""Attention kernels for GPUs, in Triton: tile by tile, so that no token x token matrix is ever in memory.

- `availability`: whether they can run on given tensors
- `copying`: attention with given maps as an operation of torch, with its derivative
- `comparing`: a student's attention and its distillation loss as one operation, with their derivatives
- `launch`: starts a kernel with tiles that fit the device
- `forward`: kernels for the output with its log-sum-exp, alone or beside the distillation loss
- `backward`: kernels for the gradients of v, of keys and values, of queries, of all three at once, and of a bias
- `tiles`: what all kernels do with one tile: load vectors, form logits, store
"""
