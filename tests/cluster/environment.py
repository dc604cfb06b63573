"""Environment of the cluster tests: cluster, image, resources, and the address of this machine for pods."""

import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from topwork import __version__

# Pod startup: the image is already on the node, but importing TensorFlow is slow on a fraction of a core.
START_SECONDS = 300.0
# A tiny job, from its submission to its published model.
RUN_SECONDS = 900.0
# Pods stop, upload their checkpoints, and are garbage-collected.
DELETION_SECONDS = 240.0
# The scheduler, the Job controller or the kubelet detects a problem and writes an event.
EVENT_SECONDS = 120.0

SERVICE_ACCOUNT_DIRECTORY = Path("/var/run/secrets/kubernetes.io/serviceaccount")
SKIP_REASON = (
    "set KUBECONFIG to an administrator's kubeconfig, and load the image into the nodes "
    "(CONTRIBUTING.md lists all variables)"
)
# A documentation address (RFC 5737) that makes the kernel choose the outgoing interface. No packet is sent to it.
DOCUMENTATION_ADDRESS = "192.0.2.1"


def has_cluster(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether KUBECONFIG or a service account selects a cluster; ~/.kube/config is never used implicitly."""
    in_cluster = environment.get("KUBERNETES_SERVICE_HOST") and (SERVICE_ACCOUNT_DIRECTORY / "token").is_file()
    return bool(environment.get("KUBECONFIG") or in_cluster)


def image(environment: Mapping[str, str] = os.environ) -> str:
    """Return the image of the pods: TOPWORK_IMAGE, or the CPU image that `make image` builds."""
    return environment.get("TOPWORK_IMAGE") or f"topwork:{__version__}-cpu"


def controller_image(environment: Mapping[str, str] = os.environ) -> str:
    """Return the image of the controller: TOPWORK_CONTROLLER_IMAGE, or the one that `make image` builds."""
    return environment.get("TOPWORK_CONTROLLER_IMAGE") or f"topwork:{__version__}-controller"


def compute_settings(environment: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Return `spec.compute` of the jobs. The defaults fit a cluster with one small node."""
    return {
        "gpus": 0,
        "cpu": environment.get("TOPWORK_TEST_CPU") or "1",
        "memory": environment.get("TOPWORK_TEST_MEMORY") or "3Gi",
        "sharedMemory": "64Mi",
        "scratch": "2Gi",
        "retries": 2,
        "deadlineSeconds": 3600,
        # Epochs take a fraction of a second. By default, they store a checkpoint once a minute.
        "checkpointMinutes": 0.02,
    }


def executable(name: str) -> str:
    """Return the path of an executable in this virtual environment."""
    return str(Path(sys.executable).with_name(name))


def reachable_address(server: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return an address of this machine that pods can reach: the address of the interface to the API server.

    If the API server has a loopback address (kind, k3s), this is the address of the default interface instead.
    """
    if configured := environment.get("TOPWORK_TEST_HOST"):
        return configured
    api_server = urlsplit(server).hostname or DOCUMENTATION_ADDRESS
    for target in (api_server, DOCUMENTATION_ADDRESS, socket.gethostname()):
        with suppress(OSError):
            family, kind, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as connection:
                connection.connect(address)
                local_address = str(connection.getsockname()[0])
            if not local_address.startswith("127.") and local_address != "::1":
                return local_address
    raise OSError("This machine has no address that pods can reach. Set TOPWORK_TEST_HOST to one.")


def in_cluster_config() -> dict[str, object]:
    """Return a kubeconfig for the service account of the pod that runs the tests."""
    address = os.environ["KUBERNETES_SERVICE_HOST"]
    address = f"[{address}]" if ":" in address else address
    server = f"https://{address}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "pod",
        "clusters": [
            {
                "name": "pod",
                "cluster": {"server": server, "certificate-authority": str(SERVICE_ACCOUNT_DIRECTORY / "ca.crt")},
            }
        ],
        "users": [{"name": "pod", "user": {"tokenFile": str(SERVICE_ACCOUNT_DIRECTORY / "token")}}],
        "contexts": [{"name": "pod", "context": {"cluster": "pod", "user": "pod"}}],
    }


def kubeconfig_with_token(config: dict[str, object], token: str) -> str:
    """Return a kubeconfig for the same cluster with the token of a service account, as JSON."""
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
