"""Splits of a stored dataset: which images are used for training, validation and test."""
