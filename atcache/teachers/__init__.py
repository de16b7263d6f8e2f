"""Teachers: models by name, their weights and input, and the device and precision they run in.

- `load`: from a name to a model with its weights
- `names`: the names by which a user may call a model
- `published`: timm models as a repository of the hub or a folder holds them, with a config
- `weights`: fit weights into a model, and name them by their sha256
- `weight_files`: read files of weights without running code in them
- `weight_sets`: find a model's weights among a file's tensors, whatever stands before their names
- `patch_grids`: position embeddings and tables of another grid of patches
- `hub`: download files from the Hugging Face hub
- `inputs`: how an image becomes the input of a model
- `devices`: which device and which float type a model runs in
- `run`: a loaded teacher, on its device and in its precision
- `record`: what a cache or a run remembers of its teacher
- `trained`: what a cache records of the training that made its teacher's weights
- `foreign/`: teachers that timm does not make
- `components`: the components of a teacher's architecture that its student lacks
- `families`: families of teachers, and whether their attention is known to transfer
- `verdict`: what is known of a teacher before a student is trained from it
"""
