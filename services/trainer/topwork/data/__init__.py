"""From a source of images to a stored dataset to batches."""
