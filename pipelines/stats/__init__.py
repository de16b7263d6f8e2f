"""Statistics of a cache's maps: what its layers and heads attend to.

- `config`: the options
- `kinds`: the statistics, and how each is computed for a layer
- `looking`: choose views, layers and heads, and decode their maps
- `means`: means over views, and their standard errors
- `tables`: tables of layers x heads
- `outputs`: the files that they are written to, checked before anything is computed
- `picture`: tables as a picture
- `report`: tables as files, and a table with a row for each view
- `run`: the statistics of some views, and their means
"""
