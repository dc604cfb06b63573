"""Image files: validation in worker processes, decoding in a TensorFlow graph, and value ranges."""
