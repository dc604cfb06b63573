"""Training of one stage: strategy, optimizer, loss, trainer, checkpoints and the feature cache."""
