"""Explaining why a container or a pod failed, with advice."""

import json
import re

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.status.objects import StageContainer, find_condition, one_line
from topwork.cluster.termination_message import parse_termination_message

# Spec keys that set the size limits of the pod's volumes.
VOLUME_KEYS = {"scratch": "spec.compute.scratch", "shm": "spec.compute.sharedMemory"}
EMPTY_DIR = re.compile(r'Usage of EmptyDir volume "(?P<volume>[^"]+)" exceeds the limit "(?P<limit>[^"]+)"')
EPHEMERAL = re.compile(r"exceeded its local ephemeral storage limit|ephemeral local storage usage exceeds")
# Exit codes of a process that a signal ended: 128 + signal number.
BUS_ERROR, KILLED, SEGMENTATION_FAULT = 135, 137, 139

SIGNALS = {
    BUS_ERROR: "bus error (SIGBUS), most likely because /dev/shm is full. Raise spec.compute.sharedMemory",
    KILLED: (
        "killed (SIGKILL): the node ran out of memory, or the grace period ended before the checkpoint was uploaded"
    ),
    SEGMENTATION_FAULT: "crashed (segmentation fault)",
}
DISRUPTIONS = {
    "PreemptionByScheduler": "preempted by the scheduler in favor of a pod with higher priority",
    "DeletionByTaintManager": "deleted from {node}, which got a taint that the job does not tolerate",
    "EvictionByEvictionAPI": "evicted from {node}, which is being drained",
    "DeletionByPodGC": "deleted because {node} no longer exists",
}


def explain_container_failure(container: StageContainer) -> str | None:
    """Explain why a container failed.

    Args:
        container: A container, terminated or not.

    Returns:
        The error in one line; None if the container has not terminated, or succeeded.
    """
    terminated = (container.status.get("state") or {}).get("terminated")
    if not terminated or terminated.get("exitCode") == 0:
        return None
    text = terminated.get("message") or ""
    message = parse_termination_message(text)
    if message and message.error:
        return one_line(message.error)
    return (
        _explain_reason(container, terminated)
        or SIGNALS.get(int(terminated["exitCode"]))
        or _last_log_line(text, terminated)
    )


def _explain_reason(container: StageContainer, terminated: KubernetesObject) -> str | None:
    reason = terminated.get("reason")
    if reason == "OOMKilled":
        limit = ((container.spec.get("resources") or {}).get("limits") or {}).get("memory")
        exceeded = f"its memory limit of {limit}" if limit else "its memory limit"
        return f"container {container.stage} exceeded {exceeded} and was OOM-killed. Raise spec.compute.memory"
    if reason in {"StartError", "ContainerCannotRun"}:
        message = one_line(str(terminated.get("message") or reason))
        image = container.spec["image"]
        return f"container {container.stage} could not be started: {message}. Is {image} a topwork image?"
    if reason == "ContainerStatusUnknown":
        return f"the node lost the status of container {container.stage}"
    return None


def _last_log_line(text: str, terminated: KubernetesObject) -> str:
    """Return the last line of the log, which Kubernetes uses as the message if a process wrote none."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return f"exit code {terminated['exitCode']} without a message"
    try:
        entry = json.loads(lines[-1])
    except ValueError:
        return one_line(lines[-1])
    if not isinstance(entry, dict):
        return one_line(lines[-1])
    return one_line(str(entry.get("error") or entry.get("message") or lines[-1]))


def explain_pod_failure(pod: KubernetesObject) -> str | None:
    """Explain why Kubernetes terminated a pod: disruption, eviction or rejection; None if it did not."""
    node = f"node {pod['spec']['nodeName']}" if pod["spec"].get("nodeName") else "its node"
    status = pod.get("status") or {}
    if disruption := find_condition(pod, "DisruptionTarget"):
        if explanation := DISRUPTIONS.get(str(disruption.get("reason"))):
            return explanation.format(node=node)
        return f"terminated by {node}: {_message(disruption, status)}"
    reason = status.get("reason")
    if not reason:
        return None
    if reason == "Evicted":
        return _explain_eviction(str(status.get("message") or ""), node)
    return f"{node} rejected or terminated the pod ({reason}): {_message(status, status)}"


def _message(source: KubernetesObject, status: KubernetesObject) -> str:
    message = source.get("message") or status.get("message") or source.get("reason") or "no reason given"
    return one_line(str(message))


def _explain_eviction(message: str, node: str) -> str:
    if exceeded := EMPTY_DIR.search(message):
        key = VOLUME_KEYS.get(exceeded["volume"])
        advice = f"Raise {key}" if key else "No spec key sets this limit: please report this"
        return f"evicted: the volume {exceeded['volume']} exceeded its limit of {exceeded['limit']}. {advice}"
    if EPHEMERAL.search(message):
        return f"evicted: {one_line(message)}. Raise spec.compute.scratch"
    return f"evicted from {node}: {one_line(message)}"
