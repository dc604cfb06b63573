"""Descriptions of the training that a job would run, computed without training."""
