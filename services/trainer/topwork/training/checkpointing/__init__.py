"""Checkpoints of a training stage: the state that they store, and how failed writes are handled."""
