"""Show: a figure of the maps of one view.

- `config`: the options
- `reading`: the view, the clean image and the maps, from a cache
- `figure`: the figure, drawn with matplotlib
- `run`: from the options to a file
"""
