"""Attention: seeing a model's factors, using given ones, and the losses between the two."""
