"""The default codec: each layer's input, predicted from the layer below, and the rest rounded in a fitted basis.

- `codec`: the codec: its settings and its targets
- `coder`: encode and decode a view, layer by layer
- `decoding`: from bytes to q and k, layer by layer
- `packing`: the integers of a view as bytes that compress well
- `escapes`: the few integers that need more bytes than they were given
- `unpacking`: the integers of a batch, read from bytes
- `fit`: measure all layers, fit them, and find the step that meets the target
- `fit_layer`: the prediction and the basis of one layer
- `metric`: what an error in a layer's input costs, in KL
- `grid_dct`: the 2-D cosine transform over the grid of patches, and its bands of frequency
"""
