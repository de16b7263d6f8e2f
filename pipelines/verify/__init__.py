"""Verify: check that a cache is what its build wrote.

- `config`: what a check is asked for
- `run`: the whole check, from start to end, and the repair
- `files`: metadata, tables and every byte of each task
- `views`: the pixels of some views, against what the teacher saw
- `teacher`: decoded maps of some views, against those of the running teacher
"""
