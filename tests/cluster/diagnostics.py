"""Diagnostics for a failed test: pods, events and logs of its namespace, before cleanup."""

import subprocess

from tests.cluster.kubectl import Kubectl, KubectlError

SELECTOR = "app.kubernetes.io/name in (topwork, topwork-controller)"
LOG_LINES = 60


def collect_diagnostics(namespace: str) -> str:
    """Collect diagnostics from a namespace.

    Args:
        namespace: Namespace of the test.

    Returns:
        Objects, output of `kubectl describe pods`, events, and the end of every log; empty if the namespace is empty.
    """
    kubectl = Kubectl(namespace)
    if not _output(kubectl, "get", "jobs,pods,resourcequotas,events", "--output", "name", "--ignore-not-found").strip():
        return ""
    sections = [
        _section(kubectl, "get", "jobs,pods,configmaps,services,networkpolicies,resourcequotas", "--output", "wide"),
        # An error if the cluster does not serve TransferJobs.
        _section(kubectl, "get", "transferjobs", "--output", "yaml"),
        _section(kubectl, "describe", "pods", "--selector", SELECTOR),
        _section(kubectl, "get", "events", "--sort-by=.metadata.creationTimestamp"),
    ]
    names = _output(kubectl, "get", "pods", "--selector", SELECTOR, "--output", "name", "--ignore-not-found").split()
    logs = [_section(kubectl, "logs", name, "--all-containers", "--prefix", f"--tail={LOG_LINES}") for name in names]
    return "\n".join([*sections, *logs])


def _section(kubectl: Kubectl, *arguments: str) -> str:
    return f"$ kubectl {' '.join(arguments)}\n{_output(kubectl, *arguments)}"


def _output(kubectl: Kubectl, *arguments: str) -> str:
    try:
        return kubectl(*arguments, seconds=60)
    except (KubectlError, subprocess.TimeoutExpired) as error:
        return str(error)
