"""From a job spec to Kubernetes objects."""
