"""The log of a run: the output of all its containers in order, across its Jobs and their pods."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import RUN_LABEL, StageName
from topwork.cluster.operations.runs import read_events
from topwork.cluster.operations.transfer_jobs import require_transfer_job
from topwork.cluster.status.objects import (
    RunObjects,
    StageContainer,
    is_job_finished,
    name_of,
    node_index,
    pods_of_job,
    stage_containers,
)
from topwork.cluster.status.run_status import RunStatus, read_run_status
from topwork.cluster.status.transfer_job_run import read_transfer_job_run
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

WAIT_SECONDS = 5.0
"""The end of a Job is noticed within this time; changes of its pods are noticed immediately."""


class ContainerHeading(NamedTuple):
    """The container whose log lines follow."""

    pod: str
    stage: StageName


# The kubelet sends this instead of a log that it cannot read, such as that of a removed container.
KUBELET_FAILURE = "unable to retrieve container logs for "


@dataclass(frozen=True)
class Note:
    """A note about the log, which no container wrote.

    Attributes:
        text: The note.
        exit_code: Exit code of the command if a part of the log is missing; 0 if none is.
    """

    text: str
    exit_code: int = 0


LogEntry = ContainerHeading | str | Note


class RunLog:
    """The log of a run.

    Args:
        cluster: The cluster.
        run: Name of the run.
        stage: Only the log of this stage; None for all stages.
        transfer_job: Name of the TransferJob whose run it is; None for a plain Job.
        node: Index of the node whose log it is. The log of the prefetch Job belongs to that of node 0.

    Example:
        >>> for entry in RunLog(cluster, "cats-1a2b3c4d", stage="transfer").read():
        ...     if isinstance(entry, str):
        ...         print(entry)
    """

    def __init__(
        self,
        cluster: "Cluster",
        run: str,
        stage: StageName | None = None,
        transfer_job: str | None = None,
        node: int = 0,
    ) -> None:
        self._cluster, self._run, self._stage, self._transfer_job = cluster, run, stage, transfer_job
        self._node = node
        self._read: set[ContainerHeading] = set()
        self._last_reason = ""

    def read(self) -> Iterator[LogEntry]:
        """Read what has been written so far: the prefetch Job first, then the pods of each Job, oldest first.

        Yields:
            The heading of each container, then its lines; notes.
        """
        objects = self._read_objects()
        for heading, _ in self._started_containers(objects):
            yield from self._read_container(heading, follow=False)
        if not self._read:
            yield self._not_started(objects)

    def follow(self) -> Iterator[LogEntry]:
        """Follow the log until the Job is finished or deleted, or the requested stage is done.

        Yields:
            The heading of each container, then its lines; notes.

        Raises:
            UnavailableError: If the API server or the node does not respond for too long.
        """
        while True:
            objects = self._read_objects()
            started = self._started_containers(objects)
            unread = [(heading, container) for heading, container in started if heading not in self._read]
            if unread:
                heading, container = unread[0]
                yield from self._read_container(heading, follow="running" in container.status["state"])
            elif self._is_finished(objects):
                if not self._read:
                    yield self._not_started(objects)
                return
            else:
                yield from self._report_reason(objects)
                self._wait_for_change(objects.pods)

    def _read_objects(self) -> RunObjects:
        if not self._run and self._transfer_job:
            self._run = self._read_transfer_job().run
        if not self._run:
            return RunObjects(())
        jobs = self._cluster.list("Job", labels=f"{RUN_LABEL}={self._run}")
        return RunObjects(jobs, self._cluster.list("Pod", labels=f"{RUN_LABEL}={self._run}"))

    def _started_containers(self, objects: RunObjects) -> Iterator[tuple[ContainerHeading, StageContainer]]:
        """Yield the containers that have started, in the order of the log."""
        for role in ("prefetch", "training"):
            for pod in self._pods(objects, role):
                for container in stage_containers(pod):
                    if container.has_started and self._stage in {None, container.stage}:
                        yield ContainerHeading(name_of(pod), container.stage), container

    def _pods(self, objects: RunObjects, role: str) -> list[KubernetesObject]:
        job = objects.job(role)
        pods = pods_of_job(objects.pods, job) if job else []
        return [pod for pod in pods if node_index(pod) == self._node]

    def _read_container(self, heading: ContainerHeading, *, follow: bool) -> Iterator[LogEntry]:
        self._read.add(heading)
        yield heading
        has_lines = False
        try:
            for line in self._cluster.logs(heading.pod, heading.stage, follow=follow):
                has_lines = True
                is_lost = line.startswith(KUBELET_FAILURE)
                yield Note(f"The node of {heading.pod} is {line}.", UnavailableError.exit_code) if is_lost else line
        except UnavailableError as error:
            if follow:
                raise
            # The node is gone; the logs of other pods can still be read.
            yield Note(str(error), UnavailableError.exit_code)
            return
        if not has_lines and not follow and self._cluster.get("Pod", heading.pod) is None:
            text = f"Pod {heading.pod} has just been deleted, and its log with it."
            yield Note(text, SettingError.exit_code)

    def _is_finished(self, objects: RunObjects) -> bool:
        if not objects.jobs and self._transfer_job:
            return self._read_transfer_job().is_finished
        if all(is_job_finished(job) for job in objects.jobs):
            return True
        pods = self._pods(objects, "training")
        # Other nodes than node 0 end before the Job does.
        if self._node and any((pod.get("status") or {}).get("phase") == "Succeeded" for pod in pods):
            return True
        return any(
            container.stage == self._stage
            and (container.status.get("state") or {}).get("terminated", {}).get("exitCode") == 0
            for pod in pods
            for container in stage_containers(pod)
        )

    def _not_started(self, objects: RunObjects) -> Note:
        name = self._run or f"transferjob/{self._transfer_job}"
        name = f"node {self._node} of {name}" if self._node else name
        subject = f"The stage {self._stage} of {name}" if self._stage else name
        if self._transfer_job and not objects.jobs and (status := self._read_transfer_job()).attempts:
            state = "complete" if status.phase == "succeeded" else status.phase
            text = f"The log of {self._run} was deleted with its Job; the run is {state}{self._reason(objects)}."
            return Note(text, SettingError.exit_code)
        if self._is_finished(objects):
            text = f"{subject} has no log, because it never started{self._reason(objects)}."
            return Note(text, SettingError.exit_code)
        return Note(f"{subject} has not started yet{self._reason(objects)}.", UnavailableError.exit_code)

    def _report_reason(self, objects: RunObjects) -> Iterator[Note]:
        reason = self._reason(objects)
        if reason and reason != self._last_reason:
            self._last_reason = reason
            yield Note(f"waiting{reason}")

    def _reason(self, objects: RunObjects) -> str:
        if not objects.jobs:
            if self._transfer_job is None:
                return ""
            status = self._read_transfer_job()
        else:
            events = read_events(self._cluster, objects.jobs, objects.pods)
            status = read_run_status(RunObjects(objects.jobs, objects.pods, events))
        reason = status.reason or status.error
        return f": {reason}" if reason else ""

    def _read_transfer_job(self) -> RunStatus:
        """Read the status of the run from its TransferJob; if that runs another one, this run is canceled."""
        assert self._transfer_job
        obj = require_transfer_job(self._cluster, self._transfer_job)
        status = read_transfer_job_run(obj)
        if self._run and status.run != self._run:
            reason = f"transferjob/{self._transfer_job} now runs {status.run or 'nothing'}"
            return replace(status, run=self._run, phase="cancelled", attempts=(), reason=reason)
        return status

    def _wait_for_change(self, pods: Sequence[KubernetesObject]) -> None:
        """Wait until a pod changes, or until the wait times out."""
        known = {pod["metadata"]["resourceVersion"] for pod in pods}
        for change in self._cluster.watch("Pod", labels=f"{RUN_LABEL}={self._run}", seconds=WAIT_SECONDS):
            if change.type == "DELETED" or change.object["metadata"]["resourceVersion"] not in known:
                return
