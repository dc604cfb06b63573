"""Checks of a dataset that need no training: near duplicates, label errors, image quality. Pure functions on arrays."""
