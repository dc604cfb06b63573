"""Datasets: from an image source to a stored dataset to training batches."""
