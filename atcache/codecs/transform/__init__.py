"""The default codec: factors in a fitted basis, rounded to equal steps.

- `codec`: the codec: its settings and its targets
- `coder`: project factors on the basis and round them, and back
- `fit`: choose the components that are stored, and the step that meets the target
- `basis`: the basis of one layer, from how its vectors vary and what an error in them costs
- `grid_dct`: the 2-D cosine transform over the grid of patches
"""
