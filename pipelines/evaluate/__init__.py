"""Evaluate: accuracy, loss and calibration of finished runs, alone and together, on one or several sets of images.

- `config`: the options of the command
- `sets`: the sets of images, from the options that name them
- `corrupted`: sets of corrupted images
- `run`: the evaluation
- `summary`: its result
- `report`: its result as Markdown
"""
