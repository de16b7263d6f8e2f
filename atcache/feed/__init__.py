"""Batches for training and validation: which samples, in which order, read by whom."""
