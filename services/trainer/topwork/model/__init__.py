"""The classifier: backbones, heads, freezing, augmentation and export."""
