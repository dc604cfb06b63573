"""Explaining why a container or a pod failed, with advice."""

import json
import math
import re
from fractions import Fraction

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import PREFETCH_MAX_MEMORY, ROLE_LABEL, StageName
from topwork.cluster.status.objects import (
    StageContainer,
    find_condition,
    get_label,
    one_line,
    parse_quantity,
    requested_amount,
)
from topwork.cluster.termination_message import parse_termination_message

# Spec keys that set the size limits of the pod's volumes.
VOLUME_KEYS = {"scratch": "spec.compute.scratch", "shm": "spec.compute.sharedMemory"}
MEMORY_VOLUMES = {"shm"}
EMPTY_DIR = re.compile(r'Usage of EmptyDir volume "(?P<volume>[^"]+)" exceeds the limit "(?P<limit>[^"]+)"')
EPHEMERAL = re.compile(r"exceeded its local ephemeral storage limit|ephemeral local storage usage exceeds")
# "The node was low on resource: ephemeral-storage. Threshold quantity: …, available: …. Container transfer was using …"
NODE_PRESSURE = re.compile(r"node was low on resource: (?P<resource>[a-z-]+)")
REJECTED_UNDER_PRESSURE = re.compile(r"node had condition: \[(?P<condition>DiskPressure|MemoryPressure|PIDPressure)\]")
PRESSURE_RESOURCES = {"DiskPressure": "ephemeral-storage", "MemoryPressure": "memory", "PIDPressure": "pids"}
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

# Spec keys that reduce the memory that a stage needs, apart from spec.compute.memory.
MEMORY_KEYS: dict[StageName, str] = {
    "pull": "",
    "transfer": ", or lower spec.transfer.batchSize, or set spec.transfer.featureCache: off",
    "fine-tune": ", or lower spec.fineTune.batchSize, or set spec.fineTune.featureCache: off",
}
MORE_MEMORY = Fraction(3, 2)
GIBIBYTE, MEBIBYTE, MEMORY_STEP_MEBIBYTES = 2**30, 2**20, 256


def explain_container_failure(container: StageContainer, pod: KubernetesObject) -> str | None:
    """Explain why a container failed.

    Args:
        container: A container, terminated or not.
        pod: Its pod.

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
        _explain_reason(container, pod, terminated)
        or SIGNALS.get(int(terminated["exitCode"]))
        or _last_log_line(text, terminated)
    )


def _explain_reason(container: StageContainer, pod: KubernetesObject, terminated: KubernetesObject) -> str | None:
    reason = terminated.get("reason")
    if reason == "OOMKilled":
        return _explain_out_of_memory(container, pod)
    if reason in {"StartError", "ContainerCannotRun"}:
        message = one_line(str(terminated.get("message") or reason))
        image = container.spec["image"]
        return f"container {container.stage} could not be started: {message}. Is {image} a topwork image?"
    if reason == "ContainerStatusUnknown":
        return f"the node lost the status of container {container.stage}"
    return None


def _explain_out_of_memory(container: StageContainer, pod: KubernetesObject) -> str:
    limit = ((container.spec.get("resources") or {}).get("limits") or {}).get("memory")
    if not limit:
        problem = f"container {container.stage} exceeded its memory limit and was OOM-killed"
        return f"{problem}. Raise spec.compute.memory{MEMORY_KEYS[container.stage]}"
    problem = f"container {container.stage} exceeded its memory limit of {limit} and was OOM-killed"
    is_at_maximum = parse_quantity(str(limit)) >= parse_quantity(PREFETCH_MAX_MEMORY)
    if get_label(pod, ROLE_LABEL) == "prefetch" and is_at_maximum:
        return (
            f"{problem}. A prefetch pod gets at most {PREFETCH_MAX_MEMORY}. Set spec.compute.prefetch: false: the "
            "training pod then pulls the dataset with spec.compute.memory"
        )
    return f"{problem}. Raise spec.compute.memory to about {_more_memory(str(limit))}{MEMORY_KEYS[container.stage]}"


def _more_memory(limit: str) -> str:
    """Return one and a half times a memory limit, rounded up to whole GiB, or to 256 MiB below 1 GiB."""
    size = parse_quantity(limit) * MORE_MEMORY
    if size > GIBIBYTE:
        return f"{math.ceil(size / GIBIBYTE)}Gi"
    return f"{math.ceil(size / MEBIBYTE / MEMORY_STEP_MEBIBYTES) * MEMORY_STEP_MEBIBYTES}Mi"


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
        message = _message(disruption, status)
        return _explain_pressure(pod, message, node) or f"terminated by {node}: {message}"
    reason = status.get("reason")
    if not reason:
        return None
    if reason == "Evicted":
        return _explain_eviction(pod, str(status.get("message") or ""), node)
    return f"{node} rejected or terminated the pod ({reason}): {_message(status, status)}"


def _message(source: KubernetesObject, status: KubernetesObject) -> str:
    message = source.get("message") or status.get("message") or source.get("reason") or "no reason given"
    return one_line(str(message))


def _explain_eviction(pod: KubernetesObject, message: str, node: str) -> str:
    if exceeded := EMPTY_DIR.search(message):
        key = VOLUME_KEYS.get(exceeded["volume"])
        advice = f"Raise {key}" if key else "No spec key sets this limit: please report this"
        return f"evicted: the volume {exceeded['volume']} exceeded its limit of {exceeded['limit']}. {advice}"
    if EPHEMERAL.search(message):
        return f"evicted: {one_line(message)}. Raise spec.compute.scratch"
    return _explain_pressure(pod, one_line(message), node) or f"evicted from {node}: {one_line(message)}"


def _explain_pressure(pod: KubernetesObject, message: str, node: str) -> str | None:
    """Explain an eviction for lack of a resource of the node; None if the message describes something else."""
    resource = pressure_resource(message)
    if resource is None:
        return None
    if resource in {"ephemeral-storage", "inodes"}:
        requested = requested_amount(pod, "ephemeral-storage")
        within = f"The pod requested {requested}. " if requested else ""
        return (
            f"evicted from {node}, whose disk is full: {message}. {within}Free disk space on the node, or keep the run "
            "off it with spec.compute.nodeSelector or affinity"
        )
    if resource == "memory":
        return (
            f"evicted from {node}, which ran out of memory: {message}. Other processes on the node use more memory "
            "than they requested: free memory, or keep the run off the node with spec.compute.nodeSelector or affinity"
        )
    return f"evicted from {node}, which ran out of {resource}: {message}"


def is_disk_eviction(pod: KubernetesObject) -> bool:
    """Return whether the kubelet evicted a pod for lack of disk space: its own limit, or the disk of the node."""
    status = pod.get("status") or {}
    if status.get("reason") != "Evicted":
        return False
    disruption = find_condition(pod, "DisruptionTarget") or {}
    message = f"{status.get('message') or ''} {disruption.get('message') or ''}"
    exceeded = EMPTY_DIR.search(message)
    if exceeded and exceeded["volume"] in MEMORY_VOLUMES:
        return False
    return bool(exceeded or EPHEMERAL.search(message) or pressure_resource(message) in {"ephemeral-storage", "inodes"})


def pressure_resource(message: str) -> str | None:
    """Return the resource that a node ran out of, from the message of an eviction; None if the cause was another."""
    if low := NODE_PRESSURE.search(message):
        return low["resource"]
    if rejected := REJECTED_UNDER_PRESSURE.search(message):
        return PRESSURE_RESOURCES[rejected["condition"]]
    return None
