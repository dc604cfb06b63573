"""The training loop of one stage: strategy, optimizer, callbacks, checkpoints."""
