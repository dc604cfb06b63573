"""Comparison of published versions and runs on the same images."""
