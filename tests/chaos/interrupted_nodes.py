"""A job on several nodes that receive signals or lose their network, and that are replaced as by a Kubernetes Job.

Each node runs its stages one after the other, each in a process of its own, like the containers of a pod. A node whose
process fails is replaced by a new one with an empty disk, while the other nodes go on or fail in turn.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.chaos.interrupted_run import (
    EPOCH_ENDED,
    EVALUATED,
    STAGES,
    TRAINING_STARTED,
    JobRun,
)
from tests.chaos.node_processes import ENTER_NAMESPACE, NodeProcess, Place, Pod, free_ports
from tests.preloaded_python import PreloadedPython

from topwork.clients.s3.storage import StorageSettings
from topwork.spec import TransferJob

NODES_CONNECTED = '"message": "nodes connected"'
FEATURES_NEEDED = '"message": "feature cache", "stage": "fine-tune", "used": true'
RESULT_KEPT = '"message": "kept weights"'
# Log lines of node 0 after which a node is interrupted, in the order in which a stage logs them; "" is its start.
MILESTONES = {
    "pull": ("",),
    "transfer": ("", NODES_CONNECTED, TRAINING_STARTED, EPOCH_ENDED, RESULT_KEPT),
    "fine-tune": ("", NODES_CONNECTED, FEATURES_NEEDED, TRAINING_STARTED, EPOCH_ENDED, RESULT_KEPT, EVALUATED),
}
MAX_END_SECONDS = 60.0
"""Time in which every node of a group ends after one of them was interrupted."""
MAX_RESTART_SECONDS = 3.0
FREEZE_SECONDS = 5.0
STALLED_SECONDS = 300.0
POLL_SECONDS = 0.02
ENDED_BY_FAILURE = {75, 143}


@dataclass(frozen=True)
class Interruption:
    """What happened after a signal, or after the loss of a link.

    Attributes:
        event: What was done.
        stage: The stage in which node 0 was.
        milestone: The log line after which it was done.
        node: The node that was hit.
        ends: For each process that had to end: index of the node, seconds from the event to its end, exit code.
        waiting: Number of other nodes that were not connected: they wait for the node that replaces this one.
    """

    event: str
    stage: str
    milestone: str
    node: int
    ends: tuple[tuple[int, float, int], ...]
    waiting: int

    @property
    def seconds(self) -> list[float]:
        """Seconds in which the other nodes ended."""
        return [seconds for node, seconds, _ in self.ends if node != self.node]

    def __str__(self) -> str:
        ends = ", ".join(f"node {node} ended with {code} after {seconds:.1f} s" for node, seconds, code in self.ends)
        after = self.milestone.partition(",")[0].removeprefix('"message": ') or "start"
        waits = f"{', ' if ends else ''}{self.waiting} waiting" if self.waiting else ""
        return f"{self.event} of node {self.node} in {self.stage} after {after}: {ends}{waits}"


class NodesRun(JobRun):
    """Runs a job on several nodes, and reads its results from storage.

    Attributes:
        interruptions: What happened so far.
        failed_replacements: Number of processes that failed although nothing was interrupted since they were started.
    """

    def __init__(
        self,
        job: TransferJob,
        directory: Path,
        settings: StorageSettings,
        python: PreloadedPython,
        places: list[Place] | None = None,
        generator: random.Random | None = None,
    ) -> None:
        super().__init__(job, directory, settings)
        count = job.spec.compute.nodes
        self.interruptions: list[Interruption] = []
        self.failed_replacements = 0
        self.pods = [Pod() for _ in range(count)]
        self.history: list[NodeProcess] = []
        self._root, self._python = directory, python
        self._generator = generator or random.Random(0)
        self._places = places or [Place("127.0.0.1", settings.endpoint_url or "")] * count
        self._ports = free_ports((count + 1) * 2)
        self._last_event = 0.0

    # ── Running ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_complete(self) -> bool:
        """Whether node 0 has completed all stages, which completes the Job."""
        return self.pods[0].is_done

    @property
    def stage(self) -> str:
        """The stage of node 0."""
        return STAGES[min(self.pods[0].stage, len(STAGES) - 1)]

    def advance_until(self, condition: Callable[[], bool], seconds: float = STALLED_SECONDS) -> bool:
        """Start, replace and check processes until a condition holds; False if it does not in this time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            for node in range(len(self.pods)):
                self._advance(node)
            time.sleep(POLL_SECONDS)
        return True

    def complete(self) -> None:
        """Run all nodes to their end. Once node 0 is done, the others are not replaced any more."""
        assert self.advance_until(lambda: self.is_complete), self.describe()
        self._stop_replacing()
        assert self.advance_until(lambda: not self.running(), MAX_END_SECONDS), self.describe()

    def close(self) -> None:
        """Kill what is left of a failed test."""
        for process in self.running():
            process.process.kill()

    def running(self) -> list[NodeProcess]:
        """Return the processes that have not ended."""
        return [pod.process for pod in self.pods if pod.process and pod.process.poll() is None]

    def describe(self) -> str:
        parts = [f"{process.describe()}:\n{process.output[-3000:]}" for process in self.history[-len(self.pods) * 2 :]]
        return "\n\n".join([*map(str, self.interruptions), *parts])

    def _stop_replacing(self) -> None:
        for pod in self.pods:
            if not pod.process or pod.process.poll() is not None:
                pod.is_done = True

    def _advance(self, node: int) -> None:
        pod = self.pods[node]
        if pod.is_done:
            return
        if pod.process is None:
            if time.monotonic() >= pod.start_at:
                pod.process = self._start(node)
            return
        if (code := pod.process.poll()) is None:
            return
        self._check_exit(pod.process, code)
        pod.process = None
        if code == 0:
            pod.stage += 1
            pod.is_done = pod.stage == len(STAGES)
        elif self.is_complete:
            pod.is_done = True
        else:
            pod.attempts, pod.stage = pod.attempts + 1, 0
            pod.start_at = time.monotonic() + self._generator.uniform(0, MAX_RESTART_SECONDS)

    def _start(self, node: int) -> NodeProcess:
        pod, place = self.pods[node], self._places[node]
        stage = STAGES[pod.stage]
        directory = self._root / f"node-{node}-{pod.attempts}"
        directory.mkdir(exist_ok=True)
        message = directory / f"termination-log-{stage}"
        message.touch()
        arguments = ["stage", stage, "--job", str(self._root / "job.json"), "--scratch", str(directory / "scratch")]
        arguments += ["--metrics-port", "0", "--termination-log", str(message)]
        program = ["-c", ENTER_NAMESPACE, place.namespace] if place.namespace else ["-m", "topwork"]
        log = directory / f"{stage}.log"
        with log.open("wb") as output:
            process = self._python.start(
                [*program, *arguments], stdout=output, stderr=output, env=self._variables(node, stage), cwd=directory
            )
        self.history.append(NodeProcess(node, stage, log, process))
        return self.history[-1]

    def _variables(self, node: int, stage: str) -> dict[str, str]:
        count, place = len(self.pods), self._places[node]
        ports = self._ports[: count + 1] if stage == "transfer" else self._ports[count + 1 :]
        return self._environment | {
            "AWS_ENDPOINT_URL": place.endpoint,
            "JOB_COMPLETION_INDEX": str(node),
            "TOPWORK_NODES": ",".join(f"{self._places[index].host}:{ports[index]}" for index in range(count)),
            "TOPWORK_COORDINATOR": f"{self._places[0].host}:{ports[count]}",
            "OMP_NUM_THREADS": "1",
            "TF_NUM_INTRAOP_THREADS": "1",
            "TF_NUM_INTEROP_THREADS": "2",
        }

    def _check_exit(self, process: NodeProcess, code: int) -> None:
        if code == 0:
            return
        if process.signals:
            expected = {-signal.SIGKILL} if signal.SIGKILL in process.signals else {143, -signal.SIGTERM, 75}
            assert code in expected, f"{code}: {process.describe()}\n{process.output}"
            return
        assert code in ENDED_BY_FAILURE, f"exit code {code}: {process.describe()}\n{process.output}"
        if process.started > self._last_event:
            self.failed_replacements += 1
        message = json.loads((process.log.parent / f"termination-log-{process.stage}").read_text())
        assert (message["exit_code"], message["node"]) == (code, process.node), message

    # ── Interrupting ──────────────────────────────────────────────────────────────────────────────────────────────

    def reach(self, stage: str, milestone: str, seconds: float) -> bool:
        """Run until some time after node 0 has logged a line in a stage; False if it completes the stage before."""

        def has_passed() -> bool:
            # A node that is replaced starts again with the first stage.
            return self.is_complete or STAGES.index(self.stage) > STAGES.index(stage)

        def is_reached() -> bool:
            process = self.pods[0].process
            if process is None or process.poll() is not None or process.stage != stage:
                return False
            return process.has_logged(milestone)

        assert self.advance_until(lambda: has_passed() or is_reached()), self.describe()
        self.advance_until(has_passed, seconds)
        return not has_passed()

    def interrupt(self, node: int, event: str, milestone: str) -> bool:
        """Send a signal to a node, and wait until it and every node that is connected to it have ended.

        Args:
            node: The node.
            event: SIGKILL or SIGTERM; SIGSTOP freezes the process until the connected ones have ended, or for some
                seconds, and then kills it; SIGCONT lets it continue instead.
            milestone: The log line after which this happens.

        Returns:
            Whether the node had a process that was not complete.
        """
        target = self.pods[node].process
        if target is None or target.poll() is not None:
            return False
        affected, stage = self.connected(target), self.stage
        waiting = len(self.running()) - len(affected) - 1
        is_frozen = event in {"SIGSTOP", "SIGCONT"}
        started = self.mark_event()
        target.send(signal.SIGSTOP if is_frozen else signal.Signals[event])
        ends = self.expect_end(affected if is_frozen else [*affected, target], started)
        if is_frozen:
            if not affected:
                self.advance_until(lambda: False, FREEZE_SECONDS)
            continued = self.mark_event()
            target.send(signal.SIGKILL if event == "SIGSTOP" else signal.SIGCONT)
            # A node that was not connected continues.
            if event == "SIGSTOP" or affected:
                ends += self.expect_end([target], continued)
        if target.poll() == 0:  # its stage was already complete
            return False
        self.interruptions.append(Interruption(event, stage, milestone, node, ends, waiting))
        return True

    def mark_event(self) -> float:
        """Return the time of an event after which processes may fail that were started before."""
        self._last_event = time.monotonic()
        return self._last_event

    def connected(self, target: NodeProcess) -> list[NodeProcess]:
        """Return the processes of other nodes that are connected to a process, and so must end with it."""
        others = [process for process in self.running() if process is not target and process.stage == target.stage]
        is_connected = target.has_logged(NODES_CONNECTED)
        return [process for process in others if is_connected and process.has_logged(NODES_CONNECTED)]

    def expect_end(self, processes: list[NodeProcess], started: float) -> tuple[tuple[int, float, int], ...]:
        """Require that processes end within a minute of an event, and return how: node, seconds, exit code."""
        ended = self.advance_until(lambda: all(process.poll() is not None for process in processes), MAX_END_SECONDS)
        alive = [process.describe() for process in processes if process.poll() is None]
        assert ended, f"still running after {MAX_END_SECONDS:g} s: {alive}\n{self.describe()}"
        return tuple((process.node, (process.ended or 0.0) - started, process.poll() or 0) for process in processes)


def measure_windows(run: NodesRun) -> dict[str, dict[str, float]]:
    """Run a job without interruption, and return how long each milestone of each stage lasts, in seconds."""
    return {stage: _measure_stage(run, stage) for stage in STAGES}


def _measure_stage(run: NodesRun, stage: str) -> dict[str, float]:
    reached: dict[str, float] = {}

    def has_ended() -> bool:
        process = run.pods[0].process
        if process and process.stage == stage:
            for milestone in MILESTONES[stage]:
                if process.has_logged(milestone):
                    reached.setdefault(milestone, time.monotonic())
        return run.is_complete or run.stage != stage

    assert run.advance_until(has_ended), run.describe()
    times = [*reached.items(), ("end", time.monotonic())]
    return {milestone: end - start for (milestone, start), (_, end) in pairwise(times)}
