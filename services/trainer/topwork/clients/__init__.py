"""Clients for external services: object storage, Prometheus and the Kubernetes API, one package for each."""
