"""Untrusted model files: what they are, and whether they are safe to open."""
