"""The attempts of a Job: one per pod, or one per pod of each node, with the state of its containers."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import StageName
from topwork.cluster.status.failure_reasons import (
    explain_container_failure,
    explain_pod_failure,
    is_disk_eviction,
)
from topwork.cluster.status.objects import (
    StageContainer,
    creation_time,
    find_condition,
    is_being_deleted,
    name_of,
    node_index,
    parse_time,
    stage_containers,
)
from topwork.cluster.termination_message import TerminationMessage, parse_termination_message
from topwork.errors import Stopped

AttemptState = Literal["waiting", "running", "stopping", "done", "stopped", "failed"]


@dataclass(frozen=True)
class ContainerStatus:
    """The status of a stage's container.

    Attributes:
        stage: The stage.
        state: State of the container.
        started: When it started.
        ended: When it terminated.
        exit_code: Its exit code.
        termination_message: Its termination message, if any.
        error: Why it failed, in one sentence.
    """

    stage: StageName
    state: Literal["waiting", "running", "done", "stopped", "failed"]
    started: datetime | None = None
    ended: datetime | None = None
    exit_code: int | None = None
    termination_message: TerminationMessage | None = None
    error: str | None = None


@dataclass(frozen=True)
class Attempt:
    """A pod of a Job.

    Attributes:
        pod: Name of the pod.
        node: Node that it is scheduled to.
        created: When it was created.
        state: State of the pod; `stopping` while it may still write its checkpoint.
        containers: Its stages, in order.
        exit_code: Exit code of the container that failed or was stopped; 0 if the pod succeeded.
        error: Why it ended or is stopping, in one sentence.
        counted: Whether its failure counts against `spec.compute.retries`.
        disk_eviction: Whether it was evicted for lack of disk space.
        index: Index of its node among those of the run; 0 on a single node.
        number: Number of the attempt, from 1: each node has a pod in each attempt.
        is_disrupted: Whether Kubernetes or a user ended it, not its own process.
    """

    pod: str
    node: str | None
    created: datetime | None
    state: AttemptState
    containers: tuple[ContainerStatus, ...]
    exit_code: int | None = None
    error: str | None = None
    counted: bool = False
    disk_eviction: bool = False
    index: int = 0
    number: int = 1
    is_disrupted: bool = False

    @property
    def ended(self) -> datetime | None:
        """When its last container ended; None while one is running, and if none has started."""
        if any(container.state == "running" for container in self.containers):
            return None
        return max((container.ended for container in self.containers if container.ended), default=None)

    @property
    def is_finished(self) -> bool:
        """Whether no container runs or will run."""
        return self.state in {"done", "stopped", "failed"}

    @property
    def current_container(self) -> ContainerStatus | None:
        """The container that is running, about to start, or the last to have ended; None if none has started."""
        started = [container for container in self.containers if container.state != "waiting"]
        waiting = [container for container in self.containers if container.state == "waiting"]
        # Between two stages, the next container is about to start.
        if started and started[-1].state == "done" and waiting and not self.is_finished:
            return waiting[0]
        return started[-1] if started else None


def read_attempt(pod: KubernetesObject, job: KubernetesObject, deleted: Collection[str] = ()) -> Attempt:
    """Read the state of a pod.

    Args:
        pod: The pod.
        job: Its Job, whose pod failure policy decides which failures count.
        deleted: UIDs of pods that were seen before and are deleted.

    Returns:
        The attempt.
    """
    containers = tuple(_read_container(container, pod) for container in stage_containers(pod))
    is_deleted = pod["metadata"].get("uid") in deleted
    state = _read_state(pod, containers, is_deleted)
    failed = next((container for container in containers if container.state in {"failed", "stopped"}), None)
    disruption = explain_pod_failure(pod)
    error = disruption or (failed.error if failed else None)
    was_deleted = is_deleted or is_being_deleted(pod)
    if error is None and was_deleted and state != "done":
        error = "the pod was deleted"
    return Attempt(
        pod=name_of(pod),
        node=pod["spec"].get("nodeName"),
        created=creation_time(pod),
        state=state,
        containers=containers,
        exit_code=failed.exit_code if failed else (0 if state == "done" else None),
        error=error,
        counted=state == "failed" and not _is_ignored(pod, containers, job),
        disk_eviction=is_disk_eviction(pod),
        index=node_index(pod),
        is_disrupted=bool(disruption or was_deleted),
    )


def number_attempts(attempts: Iterable[Attempt]) -> tuple[Attempt, ...]:
    """Number the attempts of a run.

    Args:
        attempts: The pods of all nodes, oldest first.

    Returns:
        The same pods; the number of each one follows that of the previous pod of its node.
    """
    last: Counter[int] = Counter()
    numbered = []
    for attempt in attempts:
        last[attempt.index] = max(last[attempt.index] + 1, attempt.number)
        numbered.append(replace(attempt, number=last[attempt.index]))
    return tuple(numbered)


def describe_end(attempt: Attempt) -> str:
    """Describe how an attempt ended, in one sentence."""
    code = f" with exit code {attempt.exit_code}" if attempt.exit_code else ""
    return f"{attempt.pod} ended{code}: {attempt.error or 'no reason given'}"


def _read_container(container: StageContainer, pod: KubernetesObject) -> ContainerStatus:
    state = container.status.get("state") or {}
    if running := state.get("running"):
        return ContainerStatus(container.stage, "running", started=parse_time(running.get("startedAt")))
    if not (terminated := state.get("terminated")):
        return ContainerStatus(container.stage, "waiting")
    code = int(terminated["exitCode"])
    return ContainerStatus(
        container.stage,
        "done" if code == 0 else "stopped" if code == Stopped.exit_code else "failed",
        parse_time(terminated.get("startedAt")),
        parse_time(terminated.get("finishedAt")),
        code,
        parse_termination_message(terminated.get("message") or ""),
        explain_container_failure(container, pod),
    )


def _read_state(pod: KubernetesObject, containers: tuple[ContainerStatus, ...], is_deleted: bool) -> AttemptState:
    phase = (pod.get("status") or {}).get("phase")
    if phase == "Succeeded":
        return "done"
    if phase == "Failed" or is_deleted:
        states = {container.state for container in containers}
        was_disrupted = "stopped" in states or find_condition(pod, "DisruptionTarget") or is_deleted
        return "stopped" if "failed" not in states and was_disrupted else "failed"
    if is_being_deleted(pod):
        return "stopping"
    return "running" if any(container.state != "waiting" for container in containers) else "waiting"


def _is_ignored(pod: KubernetesObject, containers: tuple[ContainerStatus, ...], job: KubernetesObject) -> bool:
    """Return whether the first matching rule of the Job's pod failure policy has the action Ignore."""
    for rule in (job["spec"].get("podFailurePolicy") or {}).get("rules") or ():
        if any(_rule_matches(pod, containers, rule)):
            return bool(rule["action"] == "Ignore")
    return False


def _rule_matches(
    pod: KubernetesObject, containers: tuple[ContainerStatus, ...], rule: KubernetesObject
) -> Iterator[bool]:
    for pattern in rule.get("onPodConditions") or ():
        yield find_condition(pod, pattern["type"], pattern.get("status", "True")) is not None
    if codes := rule.get("onExitCodes"):
        for container in containers:
            if container.exit_code and codes.get("containerName", container.stage) == container.stage:
                yield (container.exit_code in codes["values"]) is (codes["operator"] == "In")
