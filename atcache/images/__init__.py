"""From tars to images: which tars, what is in them, reading and decoding an image.

- `source`: all samples of a dataset, indexed once and then read in place
- `tars`: which tars the text of a `--data` option names
- `tar_samples`: the samples of one tar: an image and its label
- `tar_headers`: the files in one tar, from its headers alone
- `decode`: bytes to an RGB image
"""
