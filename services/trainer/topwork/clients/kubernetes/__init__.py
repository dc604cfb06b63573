"""Client of the Kubernetes API; the only package that imports the official `kubernetes` client."""

from typing import Any

KubernetesObject = dict[str, Any]
"""A Kubernetes object with the keys of its YAML form: apiVersion, kind, metadata, spec, status."""
