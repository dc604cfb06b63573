"""Runs in a Kubernetes cluster: their objects, their status, and operations on them."""
