"""From tars to samples: which tars, what is in them, reading and decoding an image."""
