"""Evaluate: accuracy, loss and calibration of finished runs, alone and together, on one or several sets of images.

- `config`: the options of the command
- `sets`: the sets of images, from the options that name them
- `run`: the evaluation
- `corrupted`: sets of corrupted images
- `summary`: its result
- `report`: its result as Markdown
"""
