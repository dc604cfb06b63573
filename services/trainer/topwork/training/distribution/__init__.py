"""Distribution of training over replicas and nodes: the strategy of the process, its batches, and lost nodes."""
