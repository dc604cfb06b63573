"""The feature cache: the output of the frozen layers, computed once per view of an image instead of once per epoch."""
