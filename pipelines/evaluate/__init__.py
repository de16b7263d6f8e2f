"""Evaluate: accuracy and loss of finished runs, one by one or averaged.

- `config`: what the command was asked for
- `run`: the evaluation
"""
