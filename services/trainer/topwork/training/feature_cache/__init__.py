"""The output of the frozen layers, computed once and kept."""
