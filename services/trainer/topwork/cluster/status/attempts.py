"""The attempts at a run: one pod of a Job each, with what became of its containers."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import StageName
from topwork.cluster.status.failure_reasons import container_error, pod_error
from topwork.cluster.status.objects import (
    ContainerFacts,
    condition,
    containers,
    created,
    is_being_deleted,
    moment,
    name_of,
)
from topwork.cluster.termination_message import Ending, read_ending
from topwork.errors import Stopped


@dataclass(frozen=True)
class Container:
    """A stage in an attempt.

    Attributes:
        stage: The stage.
        state: How it stands.
        started: When it was started.
        ended: When it ended.
        exit_code: Its exit code.
        ending: What it left as its termination message.
        error: Why it failed, in a sentence.
    """

    stage: StageName
    state: Literal["waiting", "running", "done", "stopped", "failed"]
    started: datetime | None = None
    ended: datetime | None = None
    exit_code: int | None = None
    ending: Ending | None = None
    error: str | None = None


@dataclass(frozen=True)
class Attempt:
    """A pod of a Job.

    Attributes:
        pod: Its name.
        node: The node that it is on.
        created: When it was created.
        state: How it stands; `stopping` while it may still write its checkpoint.
        containers: Its stages, in their order.
        exit_code: Exit code of the container that ended it.
        error: Why it ended or is ending, in a sentence.
        counted: Whether its failure counts against `spec.compute.retries`.
    """

    pod: str
    node: str | None
    created: datetime | None
    state: Literal["waiting", "running", "stopping", "done", "stopped", "failed"]
    containers: tuple[Container, ...]
    exit_code: int | None = None
    error: str | None = None
    counted: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state in {"done", "stopped", "failed"}

    @property
    def current(self) -> Container | None:
        """The container that is at work, or that ended last; None where none was started."""
        begun = [container for container in self.containers if container.state != "waiting"]
        waiting = [container for container in self.containers if container.state == "waiting"]
        # Between two stages: the next one is about to start.
        if begun and begun[-1].state == "done" and waiting and not self.is_over:
            return waiting[0]
        return begun[-1] if begun else None


def read_attempt(pod: KubernetesObject, job: KubernetesObject, deleted: Collection[str] = ()) -> Attempt:
    """Read the state of a pod.

    Args:
        pod: The pod.
        job: Its Job, whose rules say which failures count.
        deleted: UIDs of pods that are gone, seen before.

    Returns:
        The attempt.
    """
    found = tuple(_container(facts) for facts in containers(pod))
    gone = pod["metadata"].get("uid") in deleted
    state = _state(pod, found, gone)
    failed = next((container for container in found if container.state in {"failed", "stopped"}), None)
    told = pod_error(pod) or (failed.error if failed else None)
    if told is None and (gone or is_being_deleted(pod)) and state != "done":
        told = "its pod was deleted"
    return Attempt(
        pod=name_of(pod),
        node=pod["spec"].get("nodeName"),
        created=created(pod),
        state=state,
        containers=found,
        exit_code=failed.exit_code if failed else (0 if state == "done" else None),
        error=told,
        counted=state == "failed" and not _is_ignored(pod, found, job),
    )


def _container(facts: ContainerFacts) -> Container:
    state = facts.status.get("state") or {}
    if running := state.get("running"):
        return Container(facts.stage, "running", started=moment(running.get("startedAt")))
    if not (ended := state.get("terminated")):
        return Container(facts.stage, "waiting")
    code = int(ended["exitCode"])
    return Container(
        facts.stage,
        "done" if code == 0 else "stopped" if code == Stopped.exit_code else "failed",
        moment(ended.get("startedAt")),
        moment(ended.get("finishedAt")),
        code,
        read_ending(ended.get("message") or ""),
        container_error(facts),
    )


def _state(
    pod: KubernetesObject, found: tuple[Container, ...], gone: bool
) -> Literal["waiting", "running", "stopping", "done", "stopped", "failed"]:
    phase = (pod.get("status") or {}).get("phase")
    if phase == "Succeeded":
        return "done"
    if phase == "Failed" or gone:
        ended = {container.state for container in found}
        kept = "failed" not in ended and ("stopped" in ended or condition(pod, "DisruptionTarget") or gone)
        return "stopped" if kept else "failed"
    if is_being_deleted(pod):
        return "stopping"
    return "running" if any(container.state != "waiting" for container in found) else "waiting"


def _is_ignored(pod: KubernetesObject, found: tuple[Container, ...], job: KubernetesObject) -> bool:
    """Whether the first rule of the Job that applies to a failed pod says that it does not count."""
    for rule in (job["spec"].get("podFailurePolicy") or {}).get("rules") or ():
        if any(_applies(pod, found, rule)):
            return bool(rule["action"] == "Ignore")
    return False


def _applies(pod: KubernetesObject, found: tuple[Container, ...], rule: KubernetesObject) -> Iterator[bool]:
    for wanted in rule.get("onPodConditions") or ():
        yield condition(pod, wanted["type"], wanted.get("status", "True")) is not None
    if codes := rule.get("onExitCodes"):
        for container in found:
            if container.exit_code and codes.get("containerName", container.stage) == container.stage:
                yield (container.exit_code in codes["values"]) is (codes["operator"] == "In")
