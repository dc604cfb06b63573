"""The Kubernetes API; the only package that imports the official client."""

from typing import Any

KubernetesObject = dict[str, Any]
"""An object as its YAML reads: apiVersion, kind, metadata, spec, status."""
