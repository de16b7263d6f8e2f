"""Evaluate: accuracy and loss of finished runs, one by one or averaged.

- `config`: the options of the command
- `run`: the evaluation
- `sets`: the sets of images that runs are scored on
- `corrupted`: sets of corrupted images
- `summary`: the result
- `report`: the result as Markdown
"""
