"""A model's attention: capture its factors (q and k) or maps, attend with given ones, and compare two with a loss.

- `factors`: the attention of one layer, as its factors or as its map
- `geometry`: what all layers of one teacher's attention have in common
- `tokens`: which tokens are patches, and which come before them
- `indices`: the layers or heads that a text such as "0-5,11" names
- `blocks`: find the blocks of a ViT, and how each of them attends
- `described`: a model that timm did not make, with what capture must know of it
- `survey`: find the blocks of such a model by watching it run
- `calls`: the calls that a forward pass makes where it attends
- `chosen`: the part of a call's factors that is wanted
- `multi_head`: the attention inside `torch.nn.MultiheadAttention`
- `by_hand`: the q and k of a model that forms its logits itself
- `capture`: capture the factors or maps of a model's layers, and check that they are right
- `finite`: whether attention is finite, and where it first is not
- `recorder`: observe one forward pass and keep its factors or maps
- `intercept`: pass each block's attention call to a function of ours, which answers it
- `kernels`: attend with given factors, slice by slice, so that no whole map is in memory
- `flash/`: the same, and distillation, for GPUs: tile by tile
- `projection`: make one layer's q and k out of the input of its attention, without the model
- `projection_search`: find out how a layer's q and k are made out of the input of its attention
- `regrid`: maps on another patch grid
- `distillation`: the losses between a student's attention and its teacher's
"""
