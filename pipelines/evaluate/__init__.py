"""Evaluate: accuracy and loss of finished runs, one by one or averaged.

- `config`: the options of the command
- `run`: the evaluation
"""
