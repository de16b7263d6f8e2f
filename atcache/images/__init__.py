"""From tars to images: find the tars, list what is in them, read and decode an image.

- `source`: all samples of a dataset, indexed once and then read in place
- `selection`: the samples that a file lists
- `tars`: the tars that the text of a `--data` option names
- `class_names`: the names of classes, in a file beside the tars
- `labels`: a sample's label, and where it is
- `tar_samples`: the samples of one tar, each an image and its label
- `tar_headers`: the files in one tar, found by reading its headers only
- `decode`: turn bytes into an RGB image
"""
