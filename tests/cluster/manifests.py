"""Objects that the tests apply in addition to those of `topwork`, and the spec of a tiny job."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tests.cluster.environment import compute_settings, image
from tests.cluster.kubectl import Kubectl

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import APP_NAME, STORAGE_SECRET

ROOT = Path(__file__).parents[2]
BASE = ROOT / "k8s" / "base"

# Runs in any container of the image: checks whether a host and port are reachable.
CONNECT_SCRIPT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20).close()
except OSError as error:
    sys.exit(f"{sys.argv[1]}:{sys.argv[2]}: {error}")
"""


def base_objects(namespace: str) -> list[KubernetesObject]:
    """Return the objects of k8s/base, in another namespace."""
    return with_namespace(Kubectl()("kustomize", str(BASE)), namespace)


def with_namespace(yaml_text: str, namespace: str) -> list[KubernetesObject]:
    """Parse objects from YAML and set their namespace."""
    # The JSON round trip removes anchors and types of the YAML parser.
    objects: list[KubernetesObject] = json.loads(
        json.dumps([obj for obj in YAML(typ="safe").load_all(yaml_text) if obj])
    )
    for obj in objects:
        if obj["kind"] == "Namespace":
            obj["metadata"]["name"] = namespace
        else:
            obj["metadata"]["namespace"] = namespace
        for subject in obj.get("subjects", []):
            if "namespace" in subject:
                subject["namespace"] = namespace
    return objects


def storage_secret(variables: dict[str, str]) -> KubernetesObject:
    """Return the Secret with the AWS variables of the pods."""
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": STORAGE_SECRET}, "stringData": variables}


# No process in a pod listens on this port.
CLOSED_ENDPOINT = "http://127.0.0.1:9"


@contextmanager
def unreachable_storage(kubectl: Kubectl, variables: Mapping[str, str]) -> Iterator[None]:
    """Let containers that start in the block use a closed endpoint: they fail with exit code 75.

    Args:
        kubectl: kubectl in a namespace of its own.
        variables: The AWS variables of its Secret, which are restored after the block.
    """
    closed = {"AWS_ENDPOINT_URL": CLOSED_ENDPOINT, "AWS_ENDPOINT_URL_S3": CLOSED_ENDPOINT}
    # Unlike apply, replace removes variables that the previous Secret had.
    kubectl("replace", "--filename", "-", stdin=json.dumps(storage_secret({**variables, **closed})))
    try:
        yield
    finally:
        kubectl("replace", "--filename", "-", stdin=json.dumps(storage_secret(dict(variables))))


def inspection(job: KubernetesObject, script: str) -> KubernetesObject:
    """Return a pod with the template of a Job in which the main container runs a Python script instead of a stage.

    Its log contains the output, so that containers can be inspected on nodes that don't support `kubectl exec`.
    """
    template = copy.deepcopy(job["spec"]["template"])
    (container,) = template["spec"]["containers"]
    container |= {"command": ["python", "-c", script], "args": []}
    amounts = {"cpu": "100m", "memory": "256Mi"}
    container["resources"] = {"requests": amounts, "limits": amounts}
    template["spec"] = {**template["spec"], "containers": [container], "initContainers": []}
    # Without the labels of the run, topwork does not count it as one of its pods.
    metadata = {"name": f"{job['metadata']['name']}-inspection", "labels": {"app.kubernetes.io/name": APP_NAME}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def probe(host: str, port: int) -> KubernetesObject:
    """Return a pod that succeeds if it can connect to a host and port."""
    container = {
        "name": "probe",
        "image": image(),
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", CONNECT_SCRIPT, host, str(port)],
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


def tiny_spec(name: str, storage: str, images_uri: str) -> dict[str, Any]:
    """Return the spec of a job that trains within seconds once its pod runs."""
    return {
        "apiVersion": "topwork.dev/v1alpha1",
        "kind": "TransferJob",
        "metadata": {"name": name},
        "spec": {
            "storage": storage,
            "dataset": {
                "source": {"folder": {"uri": images_uri}},
                "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
                "imageSize": [32, 32],
            },
            "model": {"base": {"cnn": {"filters": [4, 8]}}, "head": {"dropout": 0.0}},
            "transfer": {"train": "all", "epochs": 2, "batchSize": 8, "featureCache": "off"},
            "publish": {"formats": ["keras"]},
            "compute": compute_settings(),
        },
    }


def break_rules(spec: dict[str, Any]) -> None:
    """Break two rules that the schema of the CustomResourceDefinition can't express."""
    spec["dataset"]["splits"] = {"train": "train[:80%]", "test": "train[80%:]"}
    spec["transfer"] |= {"featureCache": "on", "earlyStopping": {"patience": 2}}


RULE_ERRORS = (
    "spec.transfer.featureCache: on requires a frozen base",
    "spec.transfer.earlyStopping: monitors the validation loss, but there is no validation split",
)
"""Beginnings of the errors for a spec changed by `break_rules`."""
