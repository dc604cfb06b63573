"""Reading the status of a run from its Kubernetes objects."""
