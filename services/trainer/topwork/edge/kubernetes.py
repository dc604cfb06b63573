"""The API server of a Kubernetes cluster, in plain objects; the only module that imports the kubernetes client."""
