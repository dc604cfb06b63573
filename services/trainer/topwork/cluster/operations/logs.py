"""The log of a run: what all its containers wrote, one after the other, across its Jobs and their pods."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import RUN_LABEL, StageName
from topwork.cluster.operations.find_runs import read_events
from topwork.cluster.status.objects import ContainerFacts, RunObjects, condition, containers, name_of, of_job
from topwork.cluster.status.run_state import run_state
from topwork.errors import UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

WAIT_SECONDS = 5.0
"""The end of a Job is noticed at the latest after that time; what its pods do, at once."""


class Part(NamedTuple):
    """A container whose lines follow."""

    pod: str
    stage: StageName


@dataclass(frozen=True)
class Note:
    """Something that no container wrote, and that the reader should know."""

    text: str


class RunLog:
    """The log of a run.

    Args:
        cluster: The cluster.
        run: Name of the run.
        stage: Only what this stage wrote.
    """

    def __init__(self, cluster: "Cluster", run: str, stage: StageName | None = None) -> None:
        self._cluster, self._run, self._stage = cluster, run, stage
        self._read: set[Part] = set()
        self._told = ""

    def entries(self) -> Iterator[Part | str | Note]:
        """Give what is written: the Job that pulled ahead first, the pods of each Job by their age.

        Yields:
            A `Part`, its lines, the next one; and notes.
        """
        objects = self._objects()
        for part, _ in self._parts(objects):
            yield from self._part(part, follow=False)
        if not self._read:
            yield self._nothing(objects)

    def followed(self) -> Iterator[Part | str | Note]:
        """Give what is written and what comes, until the Job is finished or gone, or the stage is done.

        Yields:
            A `Part`, its lines, the next one; and notes.

        Raises:
            UnavailableError: If the API server or the node does not answer for too long.
        """
        while True:
            objects = self._objects()
            unread = [found for found in self._parts(objects) if found[0] not in self._read]
            if unread:
                part, facts = unread[0]
                yield from self._part(part, follow="running" in facts.status["state"])
            elif self._is_over(objects):
                if not self._read:
                    yield self._nothing(objects)
                return
            else:
                yield from self._waiting(objects)
                self._wait(objects.pods)

    def _objects(self) -> RunObjects:
        jobs = self._cluster.list("Job", labels=f"{RUN_LABEL}={self._run}")
        return RunObjects(jobs, self._cluster.list("Pod", labels=f"{RUN_LABEL}={self._run}"))

    def _parts(self, objects: RunObjects) -> Iterator[tuple[Part, ContainerFacts]]:
        """Containers that were started, in the order in which they are shown."""
        for role in ("prefetch", "training"):
            job = objects.job(role)
            for pod in of_job(objects.pods, job) if job else ():
                for facts in containers(pod):
                    begun = set(facts.status.get("state") or {}) & {"running", "terminated"}
                    if begun and self._stage in {None, facts.stage}:
                        yield Part(name_of(pod), facts.stage), facts

    def _part(self, part: Part, *, follow: bool) -> Iterator[Part | str | Note]:
        self._read.add(part)
        yield part
        try:
            yield from self._cluster.logs(part.pod, part.stage, follow=follow)
        except UnavailableError as error:
            if follow:
                raise
            yield Note(str(error))  # its node is gone; the other pods can still be read

    def _is_over(self, objects: RunObjects) -> bool:
        open_jobs = [job for job in objects.jobs if not (condition(job, "Complete") or condition(job, "Failed"))]
        training = objects.job("training")
        done = (
            facts.status["state"].get("terminated", {}).get("exitCode") == 0
            for pod in (of_job(objects.pods, training) if training else ())
            for facts in containers(pod)
            if facts.stage == self._stage and facts.status.get("state")
        )
        return not open_jobs or any(done)

    def _nothing(self, objects: RunObjects) -> Note:
        what = f"The stage {self._stage} of {self._run}" if self._stage else self._run
        return Note(f"{what} has not run yet{self._reason(objects)}.")

    def _waiting(self, objects: RunObjects) -> Iterator[Note]:
        reason = self._reason(objects)
        if reason and reason != self._told:
            self._told = reason
            yield Note(f"waiting{reason}")

    def _reason(self, objects: RunObjects) -> str:
        if not objects.jobs:
            return ""
        events = read_events(self._cluster, objects.jobs, objects.pods)
        state = run_state(RunObjects(objects.jobs, objects.pods, events))
        told = state.reason or state.error
        return f": {told}" if told else ""

    def _wait(self, pods: Sequence[KubernetesObject]) -> None:
        """Wait until something happens to a pod, or for a while."""
        known = {pod["metadata"]["resourceVersion"] for pod in pods}
        for change in self._cluster.watch("Pod", labels=f"{RUN_LABEL}={self._run}", seconds=WAIT_SECONDS):
            if change.type == "DELETED" or change.object["metadata"]["resourceVersion"] not in known:
                return
