"""Objects that the tests apply besides those of `topwork`, and the spec of a tiny job."""

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tests.cluster.kubectl import Kubectl
from tests.cluster.surroundings import image, size

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import STORAGE_SECRET

ROOT = Path(__file__).parents[2]
BASE = ROOT / "k8s" / "base"

# Any container of the image can run it: it says whether pods reach a host and a port.
REACH = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20).close()
except OSError as error:
    sys.exit(f"{sys.argv[1]}:{sys.argv[2]}: {error}")
"""


def base_objects(namespace: str) -> list[KubernetesObject]:
    """The objects of k8s/base, in a namespace of another name."""
    return moved(Kubectl()("kustomize", str(BASE)), namespace)


def moved(text: str, namespace: str) -> list[KubernetesObject]:
    """Objects in YAML, in a namespace of another name."""
    # By way of JSON: anchors and the types of the YAML reader are gone.
    objects: list[KubernetesObject] = json.loads(json.dumps([each for each in YAML(typ="safe").load_all(text) if each]))
    for each in objects:
        if each["kind"] == "Namespace":
            each["metadata"]["name"] = namespace
        else:
            each["metadata"]["namespace"] = namespace
        for subject in each.get("subjects", []):
            if "namespace" in subject:
                subject["namespace"] = namespace
    return objects


def storage_secret(variables: dict[str, str]) -> KubernetesObject:
    """The Secret that the pods take their AWS variables from."""
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": STORAGE_SECRET}, "stringData": variables}


def probe(host: str, port: int) -> KubernetesObject:
    """A pod of the image that ends well if it reaches a host and a port."""
    container = {
        "name": "probe",
        "image": image(),
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", REACH, host, str(port)],
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "256Mi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "labels": {"app.kubernetes.io/name": "topwork"}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": security,
            "containers": [container],
        },
    }


def spec_of(name: str, storage: str, photos: str) -> dict[str, Any]:
    """A job that trains within seconds once its pod runs."""
    return {
        "apiVersion": "topwork.dev/v1alpha1",
        "kind": "TransferJob",
        "metadata": {"name": name},
        "spec": {
            "storage": storage,
            "dataset": {
                "source": {"folder": {"uri": photos}},
                "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
                "imageSize": [32, 32],
            },
            "model": {"base": {"cnn": {"filters": [4, 8]}}, "head": {"dropout": 0.0}},
            "transfer": {"train": "all", "epochs": 2, "batchSize": 8, "featureCache": "off"},
            "publish": {"formats": ["keras"]},
            "compute": size(),
        },
    }
