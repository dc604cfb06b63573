"""A small CustomResourceDefinition of TransferJobs, for tests of the API server itself."""

from typing import Any

Object = dict[str, Any]

FREE = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
CONDITIONS = {
    "type": "array",
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["type"],
    "items": {
        "type": "object",
        "required": ["type", "status"],
        "properties": {
            "type": {"type": "string"},
            "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
            "reason": {"type": "string"},
            "message": {"type": "string"},
            "lastTransitionTime": {"type": "string", "format": "date-time"},
            "observedGeneration": {"type": "integer", "format": "int64"},
        },
    },
}


def definition(spec: Object = FREE, **version: Any) -> Object:
    """Return a definition of TransferJobs with a schema of `spec` and changed fields of its version."""
    schema = {
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": FREE | {"properties": {"conditions": CONDITIONS}},
        },
    }
    names = {"kind": "TransferJob", "plural": "transferjobs", "shortNames": ["tj"], "categories": ["topwork"]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "transferjobs.topwork.dev"},
        "spec": {
            "group": "topwork.dev",
            "names": names | {"singular": "transferjob", "listKind": "TransferJobList"},
            "scope": "Namespaced",
            "versions": [
                {
                    "name": "v1alpha1",
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": "State", "type": "string", "jsonPath": ".status.state"},
                        {"name": "Run", "type": "string", "jsonPath": ".status.run", "priority": 1},
                        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
                    ],
                }
                | version
            ],
        },
    }
