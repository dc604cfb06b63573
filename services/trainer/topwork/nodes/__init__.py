"""Training on several nodes: who takes part, how the nodes find each other, and how they agree on decisions."""
