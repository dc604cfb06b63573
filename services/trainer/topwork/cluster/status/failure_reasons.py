"""Why a container or a whole pod ended, in a sentence that says what to do."""

import json
import re

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.status.objects import ContainerFacts, condition, one_line
from topwork.cluster.termination_message import read_ending

# Keys of the spec by which the volumes of the pod grow.
VOLUME_KEYS = {"scratch": "spec.compute.scratch", "shm": "spec.compute.sharedMemory"}
EMPTY_DIR = re.compile(r'Usage of EmptyDir volume "(?P<volume>[^"]+)" exceeds the limit "(?P<limit>[^"]+)"')
EPHEMERAL = re.compile(r"exceeded its local ephemeral storage limit|ephemeral local storage usage exceeds")
# Exit codes of a process that a signal ended, as a shell counts them: 128 + signal.
BUS_ERROR, KILLED, SEGMENTATION_FAULT = 135, 137, 139

DISRUPTIONS = {
    "PreemptionByScheduler": "preempted: the scheduler made room for a pod of higher priority",
    "DeletionByTaintManager": "deleted from {node}, which got a taint that the job does not tolerate",
    "EvictionByEvictionAPI": "evicted from {node}, which is being drained",
    "DeletionByPodGC": "lost with {node}, which is gone",
}


def container_error(container: ContainerFacts) -> str | None:
    """Say why a container failed.

    Args:
        container: A container, terminated or not.

    Returns:
        The error in one line; None if it has not ended, or ended well.
    """
    ended = (container.status.get("state") or {}).get("terminated")
    if not ended or ended.get("exitCode") == 0:
        return None
    message = ended.get("message") or ""
    ending = read_ending(message)
    if ending and ending.error:
        return one_line(ending.error)
    return _by_reason(container, ended) or _by_exit_code(int(ended["exitCode"])) or _last_line(message, ended)


def _by_reason(container: ContainerFacts, ended: KubernetesObject) -> str | None:
    reason = ended.get("reason")
    if reason == "OOMKilled":
        limit = ((container.spec.get("resources") or {}).get("limits") or {}).get("memory", "its limit")
        return f"{container.stage} needed more memory than {limit} and was killed. Raise spec.compute.memory"
    if reason in {"StartError", "ContainerCannotRun"}:
        message = one_line(str(ended.get("message") or reason))
        return f"{container.stage} could not be started: {message}. Is {container.spec['image']} an image of topwork?"
    if reason == "ContainerStatusUnknown":
        return f"the node lost track of {container.stage}"
    return None


def _by_exit_code(code: int) -> str | None:
    if code == BUS_ERROR:
        return "bus error (SIGBUS), mostly for want of room in /dev/shm. Raise spec.compute.sharedMemory"
    if code == KILLED:
        return (
            "killed (SIGKILL): the node ran out of memory, or the grace period was over before the checkpoint was kept"
        )
    if code == SEGMENTATION_FAULT:
        return "crashed (segmentation fault)"
    return None


def _last_line(message: str, ended: KubernetesObject) -> str:
    """Take the last line of the log, which Kubernetes keeps where a process left no message of its own."""
    lines = [line for line in message.splitlines() if line.strip()]
    if not lines:
        return f"exit code {ended['exitCode']} without a word"
    try:
        told = json.loads(lines[-1])
    except ValueError:
        return one_line(lines[-1])
    return one_line(str(told.get("error") or told.get("message") or lines[-1]) if isinstance(told, dict) else lines[-1])


def pod_error(pod: KubernetesObject) -> str | None:
    """Say why a whole pod was ended from outside; None if it was not."""
    node = f"node {pod['spec']['nodeName']}" if pod["spec"].get("nodeName") else "its node"
    if disruption := condition(pod, "DisruptionTarget"):
        told = DISRUPTIONS.get(str(disruption.get("reason")))
        if told:
            return told.format(node=node)
        return f"ended by {node}: {_told(disruption, pod)}"
    status = pod.get("status") or {}
    reason = status.get("reason")
    if not reason:
        return None
    if reason == "Evicted":
        return _evicted(str(status.get("message") or ""), node)
    return f"{node} refused or ended the pod ({reason}): {_told(status, pod)}"


def _told(place: KubernetesObject, pod: KubernetesObject) -> str:
    status = pod.get("status") or {}
    return one_line(str(place.get("message") or status.get("message") or place.get("reason") or "no reason given"))


def _evicted(message: str, node: str) -> str:
    if over := EMPTY_DIR.search(message):
        key = VOLUME_KEYS.get(over["volume"])
        advice = f"Raise {key}" if key else "No key of the spec raises it: report this"
        return f"evicted: the volume {over['volume']} holds more than {over['limit']}. {advice}"
    if EPHEMERAL.search(message):
        return f"evicted: {one_line(message)}. Raise spec.compute.scratch"
    return f"evicted from {node}: {one_line(message)}"
