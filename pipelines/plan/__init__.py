"""Plan: what a cache would cost, and whether it would pay.

- `config`: the options of a plan, and the numbers that it takes as given
- `run`: the whole plan, from start to end
- `verdict`: does a cache pay? Arithmetic on speeds and sizes
- `measure`: sizes, fidelity and speeds, measured with the models
- `images`: what a view's image costs one core, and what to do if images are the limit
- `steps`: how long a student's training step takes
- `disk`: how fast a disk writes and reads
"""
