"""Probe: does the teacher's attention help on these images? A small trial, before days are spent.

- `config`: the options of a probe
- `run`: the whole probe, from start to end
- `caches`: small caches of a part of the images, if there are none yet
- `schedule`: how many seeds and steps fit into the time
- `difference`: how far ahead the students are, how sure that is, and the answer in words
"""
