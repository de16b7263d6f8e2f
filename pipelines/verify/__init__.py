"""Verify: check that a cache is what its build wrote.

- `config`: the options of a check
- `run`: the whole check, from start to end, and the repair
- `files`: metadata, tables and every byte of each task
- `views`: the pixels of some views, compared with what the teacher saw
- `teacher`: decoded maps of some views, compared with maps of the running teacher
"""
