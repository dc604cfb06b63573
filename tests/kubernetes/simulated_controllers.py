"""Simulated controllers for the API server used in tests: Job controller, kubelet and garbage collector.

    with SimulatedControllers(api_server, stage_seconds=0.05, script={"transfer": [75, 0]}) as controllers:
        cluster.apply(job)                        # its pod runs pull, transfer, fine-tune; transfer fails once
        ...
    assert controllers.overlapping_pods() == []   # no two pods of a run were ever active at the same time

A thread calls `step` every few milliseconds. Without the thread (do not enter the context), a test calls `step` itself
and moves the clock with `advance`. Results of stages and checkpoints survive the pod, as in storage: a new pod of the
same run skips finished stages and resumes the others.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator

from api_server import ApiServer
from simulated_jobs import JobController
from simulated_kubelet import Kubelet, PodRecord, SimulatedClock


class SimulatedControllers:
    """Job controller, kubelet and garbage collector.

    Args:
        server: The API server.
        stage_seconds: Duration of each stage, or by stage.
        shutdown_seconds: Time between SIGTERM and the end of the process.
        start_seconds: Time from the creation of a pod until its first container runs.
        script: Exit codes of a stage in its first attempts, such as {"transfer": [1, 0]}; later ones succeed.
        pod_ip: IP of the pods.

    Attributes:
        clock: The clock of all timestamps and durations.
        kubelet: The kubelet; `kubelet.stage_seconds` and `kubelet.can_schedule` may be changed at any time.
        pods: All pods so far, in order of their creation.
    """

    def __init__(
        self,
        server: ApiServer,
        *,
        stage_seconds: float | dict[str, float] = 0.05,
        shutdown_seconds: float = 0.05,
        start_seconds: float = 0.0,
        script: dict[str, list[int]] | None = None,
        pod_ip: str = "127.0.0.1",
    ) -> None:
        self.server = server
        self.clock = SimulatedClock()
        self.kubelet = Kubelet(server, self.clock, stage_seconds, shutdown_seconds, start_seconds, pod_ip)
        self.kubelet.script = {stage: [*codes] for stage, codes in (script or {}).items()}
        self._jobs = JobController(server, self.clock, self.kubelet)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        server.objects.now = self.clock.now
        server.deletion.has_controllers = True

    def __enter__(self) -> "SimulatedControllers":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread
        self._thread.join()
        if self._error:
            raise self._error

    @property
    def pods(self) -> list[PodRecord]:
        return self.kubelet.pods

    def step(self) -> None:
        """Let each controller act once."""
        with self.server.objects.changed:
            self._jobs.step()
            self.kubelet.step()
            self.server.deletion.collect_garbage()

    def advance(self, seconds: float) -> None:
        """Move the clock forward; before and after, let the controllers act until nothing changes."""
        self.settle()
        self.clock.offset += seconds
        self.settle()

    def settle(self) -> None:
        """Let the controllers act until nothing changes."""
        version = -1
        while version != (version := self.server.objects.version):
            self.step()

    def evict(self, pod: str, *, namespace: str | None = None, reason: str = "DeletionByTaintManager") -> None:
        """Evict a pod, as a node drain or a preemption does."""
        self.kubelet.evict(pod, namespace, reason)

    def kill(self, pod: str, code: int = 137) -> None:
        """Kill the process of a pod; it stores no checkpoint."""
        self.kubelet.kill(pod, code)

    def active_pods(self, run: str) -> list[PodRecord]:
        """Return the pods of a run that have not ended."""
        return [pod for pod in self.pods if pod.run == run and pod.ended is None]

    def overlapping_pods(self) -> list[tuple[str, str]]:
        """Return the pairs of pods of the same run, role and index that were active at the same time."""
        return [
            (one.name, other.name)
            for one, other in itertools.combinations(self.pods, 2)
            if (one.namespace, one.run, one.role) == (other.namespace, other.run, other.role)
            and (one.index == other.index or one.job_uid != other.job_uid)
            and (one.ended is None or one.ended > other.created)
        ]

    def job_creations(self) -> Counter[str]:
        """Return how often each Job was created, by name."""
        return Counter(self._created("Job"))

    def _created(self, kind: str) -> Iterator[str]:
        for change in self.server.objects.history:
            if change.kind == kind and change.type == "ADDED":
                yield change.object["metadata"]["name"]

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.step()
                time.sleep(0.005)
        except Exception as error:
            self._error = error
