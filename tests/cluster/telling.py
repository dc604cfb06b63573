"""What a failing test shows of the cluster: pods, events and logs, before anything is cleaned up."""

import subprocess

from tests.cluster.kubectl import Kubectl, KubectlError

OURS = "app.kubernetes.io/name=topwork"
LOG_LINES = 60


def account(namespace: str) -> str:
    """Tell what happened in a namespace.

    Args:
        namespace: Namespace of the test.

    Returns:
        Objects, pods as `kubectl describe` shows them, the last events, and the end of every log; empty where nothing
        of that is left.
    """
    kubectl = Kubectl(namespace)
    if not _told(kubectl, "get", "jobs,pods,resourcequotas,events", "--output", "name", "--ignore-not-found").strip():
        return ""
    parts = [
        _part(kubectl, "get", "jobs,pods,configmaps,resourcequotas", "--output", "wide"),
        _part(kubectl, "describe", "pods", "--selector", OURS),
        _part(kubectl, "get", "events", "--sort-by=.metadata.creationTimestamp"),
    ]
    names = _told(kubectl, "get", "pods", "--selector", OURS, "--output", "name", "--ignore-not-found").split()
    logs = [_part(kubectl, "logs", name, "--all-containers", "--prefix", f"--tail={LOG_LINES}") for name in names]
    return "\n".join([*parts, *logs])


def _part(kubectl: Kubectl, *arguments: str) -> str:
    return f"$ kubectl {' '.join(arguments)}\n{_told(kubectl, *arguments)}"


def _told(kubectl: Kubectl, *arguments: str) -> str:
    try:
        return kubectl(*arguments, seconds=60)
    except (KubectlError, subprocess.TimeoutExpired) as error:
        return str(error)
