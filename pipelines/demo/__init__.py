"""Demo: attention transfer from start to end, on handwritten digits.

- `config`: the options of the demo
- `run`: the whole demo, from start to end
- `picture`: draw some cached maps over their images
- `summary`: the results of a demo
- `page`: the results as a page, with a picture and what to do next
"""
