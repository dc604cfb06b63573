"""Building the Kubernetes objects of a run from its job spec."""
