"""Models saved by Keras 2: rebuilt with the layers of Keras 3, and their weights."""
