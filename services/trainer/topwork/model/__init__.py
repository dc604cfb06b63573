"""The classifier: backbones, heads, freezing, augmentation and serving signatures."""
