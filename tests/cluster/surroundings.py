"""What the tests find around them: which cluster, which image, and where this machine is seen from the pods."""

import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from topwork import __version__

# A pod starts: its image is there already, but TensorFlow takes long to import on a fraction of a core.
START_SECONDS = 300.0
# A tiny job from submit to its published model.
RUN_SECONDS = 900.0
# Pods are stopped, their checkpoints uploaded, and their objects collected.
GONE_SECONDS = 240.0
# The scheduler, the Job controller or the kubelet notices something and writes an event.
NOTICE_SECONDS = 120.0

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
NO_CLUSTER = (
    "set KUBECONFIG to an administrator's kubeconfig, and load the image into the nodes "
    "(CONTRIBUTING.md names all that can be set)"
)
# No packet goes there: the address (RFC 5737) only makes the kernel choose the way out of this machine.
ANYWHERE = "192.0.2.1"


def has_cluster(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether KUBECONFIG or the account of a pod says which cluster is meant; ~/.kube/config is never used unasked."""
    in_cluster = environment.get("KUBERNETES_SERVICE_HOST") and (ACCOUNT / "token").is_file()
    return bool(environment.get("KUBECONFIG") or in_cluster)


def image(environment: Mapping[str, str] = os.environ) -> str:
    """The image that the pods run: the one for processors, as `make image` names it, unless TOPWORK_IMAGE says."""
    return environment.get("TOPWORK_IMAGE") or f"topwork:{__version__}-cpu"


def size(environment: Mapping[str, str] = os.environ) -> dict[str, object]:
    """`spec.compute` of the jobs: small enough for a cluster of one small node, unless told otherwise."""
    return {
        "gpus": 0,
        "cpu": environment.get("TOPWORK_TEST_CPU") or "1",
        "memory": environment.get("TOPWORK_TEST_MEMORY") or "3Gi",
        "sharedMemory": "64Mi",
        "scratch": "2Gi",
        "retries": 2,
        "deadlineSeconds": 3600,
    }


def program(name: str) -> str:
    """A program of this environment."""
    return str(Path(sys.executable).with_name(name))


def host(server: str, environment: Mapping[str, str] = os.environ) -> str:
    """The address of this machine that pods can reach: the one that it has towards the API server.

    A cluster on this machine (kind, k3s) has its API server on a loopback address; then it is the one towards anywhere.
    """
    if stated := environment.get("TOPWORK_TEST_HOST"):
        return stated
    towards = urlsplit(server).hostname or ANYWHERE
    for target in (towards, ANYWHERE, socket.gethostname()):
        with suppress(OSError):
            family, kind, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as connection:
                connection.connect(address)
                found = str(connection.getsockname()[0])
            if not found.startswith("127.") and found != "::1":
                return found
    raise OSError("This machine has no address that pods could reach. Set TOPWORK_TEST_HOST to one.")


def in_cluster_config() -> dict[str, object]:
    """The account of a pod as a kubeconfig."""
    address = os.environ["KUBERNETES_SERVICE_HOST"]
    address = f"[{address}]" if ":" in address else address
    server = f"https://{address}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "pod",
        "clusters": [{"name": "pod", "cluster": {"server": server, "certificate-authority": str(ACCOUNT / "ca.crt")}}],
        "users": [{"name": "pod", "user": {"tokenFile": str(ACCOUNT / "token")}}],
        "contexts": [{"name": "pod", "context": {"cluster": "pod", "user": "pod"}}],
    }


def as_account(config: dict[str, object], token: str) -> str:
    """A kubeconfig for the same cluster with the token of a service account, as text."""
    cluster = config["clusters"][0]  # type: ignore[index]
    context = {"cluster": cluster["name"], "user": "account"}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "account",
            "clusters": [cluster],
            "users": [{"name": "account", "user": {"token": token}}],
            "contexts": [{"name": "account", "context": context}],
        }
    )
