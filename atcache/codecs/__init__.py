"""Codecs: factors to integers of fixed shape and back."""
