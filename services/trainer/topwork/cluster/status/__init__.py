"""From Kubernetes objects to what the user sees."""
