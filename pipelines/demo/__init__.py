"""Demo: attention transfer from start to end, on handwritten digits.

- `config`: what the demo is asked for
- `run`: the whole demo, from start to end
- `picture`: draw some cached maps over their images
- `commands`: print what was run as commands to type
"""
