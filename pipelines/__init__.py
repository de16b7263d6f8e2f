"""What the commands do. Each has a config and a function that runs it, which Python can call as well.

- `pack/`: make tars from a folder of images
- `plan/`: what a cache would cost, and whether it would pay
- `probe/`: does the teacher's attention help? A small trial
- `build/`: run the teacher once and store its attention
- `merge/`: make one cache of several
- `publish/`: put a cache on a Hugging Face hub, and fetch one
- `show/`: a figure of the maps of one view
- `stats/`: what a cache's layers and heads attend to
- `compare/`: how near the maps of two caches are to each other
- `view/`: look at maps in the browser
- `verify/`: check that a cache is what its build wrote
- `train/`: train students
- `evaluate/`: accuracy and loss of finished runs
- `maps/`: a cache of a trained student's own attention
- `pretrain/`: make a teacher from any timm ViT
- `report/`: a page about a finished run
- `pages/`: what pages have in common: frame, charts, pictures
- `demo/`: all of it on handwritten digits, in minutes
- `api`: what the commands do, as functions to call
- `options`: the options of a command, written once as the fields of its config
- `cluster/`: work on the workers of a dask cluster
- `running/`: what every long run needs
- `fidelity`: how far decoded maps are from the teacher's, and when to warn
"""
