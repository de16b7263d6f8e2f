"""Attention of a model: capturing its factors (q and k) or maps, attending with given ones, and losses between two.

- `factors`: what is captured of one layer, its factors or its map
- `geometry`: what all layers of one teacher's attention share
- `tokens`: which tokens are patches and which stand before them
- `indices`: which layers and heads a text such as "0-5,11" names
- `blocks`: find the blocks of a ViT, and how each of them attends
- `capture`: capture the factors or maps of a model's layers, and check that they are the right ones
- `recorder`: one forward pass while it is captured
- `intercept`: pass a model's attention calls to a function of ours, block by block
- `kernels`: attend with given factors, slice by slice, so that no whole map is in memory
- `distillation`: the losses between a student's attention and its teacher's
"""
