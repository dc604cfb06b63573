"""Simulated scheduler and kubelet: moves the containers of pods through their stages.

A run that publishes nothing reports the metrics that `Kubelet.evaluate` returns for its spec.

The pods of a run on several nodes behave like those of topwork: node 0 pulls while the others wait; they train only
once all of them are in the same stage; if one ends, the others end, too; only node 0 publishes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sample_objects
from api_apply import timestamp
from api_kinds import Key, Object
from api_server import NAMESPACE, ApiServer
from ruamel.yaml import YAML

from topwork.cluster.termination_message import TerminationMessage

FINISHED = {"Succeeded", "Failed"}
# The message of a stage that ends without error: epochs, metric and its value.
RESULTS: dict[str, dict[str, Any]] = {
    "pull": {},
    "transfer": {"epochs": 5, "metric": "validation_accuracy", "value": 0.91},
    "fine-tune": {"epochs": 10, "metric": "accuracy", "value": 0.97},
}


class SimulatedClock:
    """A clock that a test can move forward, and stop."""

    def __init__(self) -> None:
        self.offset = 0.0
        self._stopped: tuple[float, datetime] | None = None

    def stop(self) -> None:
        """Let only `offset` move the clock from now on."""
        self._stopped = time.monotonic(), datetime.now(UTC)

    def seconds(self) -> float:
        return (self._stopped[0] if self._stopped else time.monotonic()) + self.offset

    def now(self) -> datetime:
        now = self._stopped[1] if self._stopped else datetime.now(UTC)
        return now + timedelta(seconds=self.offset)

    def timestamp(self) -> str:
        return timestamp(self.now())


@dataclass
class PodRecord:
    """A pod, and when it was active, in seconds of the clock; `ended` is None until all its processes have ended.

    Attributes:
        index: Its completion index; 0 if its Job is not Indexed.
        nodes: Number of pods that train the run together.
        group: UIDs of the pods that form a group with it in the running stage; empty before they have connected.
        group_start: When they had connected.
        exit_code: Exit code of the last container that ended.
    """

    namespace: str
    name: str
    uid: str
    job: str
    job_uid: str
    run: str
    role: str
    created: float
    ended: float | None = None
    started_stage: float = 0.0
    terminating_since: float | None = None
    container: int = -1
    states: list[Object] = field(default_factory=list)
    index: int = 0
    nodes: int = 1
    group: tuple[str, ...] = ()
    group_start: float = 0.0
    exit_code: int = 0


class Kubelet:
    """Scheduler and kubelet of one node.

    Attributes:
        script: Exit codes of the next attempts of a stage.
        stage_seconds: Duration of each stage, or by stage.
        can_schedule: Whether the node has room for a pod.
        unschedulable: Completion indexes of the pods for which no node has room.
        trained_seconds: Checkpointed progress by run and stage.
        evaluate: Returns the metrics on the validation split of a run that publishes nothing, from its spec.
        dataset: Key prefix of the dataset of the next pods.
    """

    def __init__(
        self,
        server: ApiServer,
        clock: SimulatedClock,
        stage_seconds: float | dict[str, float],
        shutdown_seconds: float,
        start_seconds: float,
        pod_ip: str,
    ) -> None:
        self.pods: list[PodRecord] = []
        self.script: dict[str, list[int]] = {}
        self.stage_seconds = stage_seconds
        self.shutdown_seconds, self.start_seconds = shutdown_seconds, start_seconds
        self.pod_ip = pod_ip
        self.can_schedule = True
        self.unschedulable: set[int] = set()
        self.trained_seconds: dict[tuple[str, str], float] = {}
        self.evaluate: Callable[[Object], dict[str, float]] = lambda _: {"accuracy": 0.9, "loss": 0.3}
        self.dataset = "datasets/flowers/0123456789abcdef"
        self._server, self._clock = server, clock
        self._models: dict[str, str] = {}

    def step(self) -> None:
        """Act on all pods once."""
        # A deleted pod stays until the next step, in which the Job controller has counted it.
        for obj in self._server.objects.list_all():
            if obj["kind"] == "Pod" and "deletionTimestamp" in obj["metadata"] and is_finished(obj):
                self._server.objects.remove(Key("Pod", obj["metadata"]["namespace"], obj["metadata"]["name"]))
        for record in self.pods:
            if record.ended is None:
                self._step_pod(record)

    def track(self, pod: Object) -> None:
        """Take over a pod that the Job controller created."""
        metadata, labels = pod["metadata"], pod["metadata"]["labels"]
        owner = metadata["ownerReferences"][0]
        containers = _containers(pod)
        self.pods.append(
            PodRecord(
                metadata["namespace"],
                metadata["name"],
                metadata["uid"],
                owner["name"],
                owner["uid"],
                labels.get("topwork.dev/run", owner["name"]),
                labels.get("topwork.dev/role", ""),
                self._clock.seconds(),
                states=[sample_objects.waiting() for _ in containers],
                index=sample_objects.completion_index(pod) or 0,
                nodes=_number_of_nodes(pod),
            )
        )

    def evict(self, name: str, namespace: str | None, reason: str) -> None:
        """Add the condition DisruptionTarget to a pod, and delete it."""
        with self._server.objects.changed:
            pod = self._server.get("Pod", name, namespace=namespace)
            assert pod is not None, f"no pod {name}"
            disruption = sample_objects.disruption(reason, "evicted by the test")
            conditions = [*pod["status"].get("conditions", []), disruption]
            self._server.patch("Pod", name, {"status": {"conditions": conditions}}, namespace=namespace)
            self._server.deletion.delete(Key("Pod", namespace or NAMESPACE, name), {})

    def kill(self, name: str, code: int) -> None:
        """End the process of a pod without a checkpoint, as the OOM killer does with SIGKILL."""
        with self._server.objects.changed:
            record = next(record for record in self.pods if record.name == name)
            pod = self._server.get("Pod", name, namespace=record.namespace)
            assert pod is not None, f"no pod {name}"
            self._end_container(record, _containers(pod)[record.container]["name"], code)
            self._finish(record, pod, "Failed", self._clock.seconds())

    def _step_pod(self, record: PodRecord) -> None:
        pod = self._server.get("Pod", record.name, namespace=record.namespace)
        now = self._clock.seconds()
        if pod is None or pod["metadata"]["uid"] != record.uid:
            record.ended = now  # deleted without grace
        elif "deletionTimestamp" in pod["metadata"]:
            self._terminate(record, pod, now)
        elif "nodeName" not in pod["spec"]:
            self._schedule(record, pod, now)
        elif record.container < 0:
            if now - record.started_stage >= self.start_seconds:
                self._start_container(record, pod, 0, now)
        else:
            self._run_stage(record, pod, now)

    def _schedule(self, record: PodRecord, pod: Object, now: float) -> None:
        if not self.can_schedule or record.index in self.unschedulable:
            condition = sample_objects.not_scheduled(sample_objects.NO_GPUS) | {
                "lastTransitionTime": pod["metadata"]["creationTimestamp"]
            }
            self._patch_status(record, phase="Pending", conditions=[condition])
            return
        record.started_stage = now
        condition = {"type": "PodScheduled", "status": "True", "lastTransitionTime": self._clock.timestamp()}
        change = {"spec": {"nodeName": f"gpu-{record.index + 1}"}}
        self._server.patch("Pod", record.name, change, namespace=record.namespace)
        self._patch_status(
            record, phase="Pending", conditions=[condition], podIP=self.pod_ip, startTime=self._clock.timestamp()
        )
        self._show_states(record, pod, "Pending")

    def _start_container(self, record: PodRecord, pod: Object, index: int, now: float) -> None:
        record.container, record.started_stage = index, now
        record.states[index] = {"running": {"startedAt": self._clock.timestamp()}}
        is_main = index >= len(pod["spec"].get("initContainers", []))
        self._show_states(record, pod, "Running" if is_main else "Pending")

    def _run_stage(self, record: PodRecord, pod: Object, now: float) -> None:
        stage = _containers(pod)[record.container]["name"]
        if record.nodes > 1 and (code := self._step_node(record, stage, now)) != 0:
            if code is not None:
                self._end_container(record, stage, code)
                self._finish(record, pod, "Failed", now)
            return
        if self._progress(record, stage, now) < self._duration(stage):
            return
        codes = self.script.get(stage, [])
        is_complete = record.nodes > 1 and self.trained_seconds.get((record.run, stage)) == float("inf")
        code = codes.pop(0) if codes and not is_complete else 0
        self._end_container(record, stage, code)
        if code:
            self._finish(record, pod, "Failed", now)
            return
        self.trained_seconds[record.run, stage] = float("inf")
        if record.container + 1 < len(record.states):
            self._start_container(record, pod, record.container + 1, now)
        else:
            self._finish(record, pod, "Succeeded", now)

    def _step_node(self, record: PodRecord, stage: str, now: float) -> int | None:
        """Let a node of several wait for the others, or notice the end of another one.

        Returns:
            0 if the stage goes on, None if the node waits, otherwise its exit code.
        """
        if self.trained_seconds.get((record.run, stage)) == float("inf"):
            return 0
        if stage == "pull":
            return 0 if record.index == 0 else None
        if record.group:
            ended = [peer for peer in self.pods if peer.uid in record.group and peer.ended is not None]
            return 0 if not ended else 143 if ended[0].exit_code == 143 else 75
        peers = [peer for peer in self.pods if peer.job_uid == record.job_uid and peer.ended is None]
        ready = [peer for peer in peers if self._stage_of(peer) == stage and peer.terminating_since is None]
        if len(ready) < record.nodes:
            return None
        for peer in ready:
            peer.group, peer.group_start = tuple(peer.uid for peer in ready), now
        return 0

    def _stage_of(self, record: PodRecord) -> str:
        pod = self._server.get("Pod", record.name, namespace=record.namespace)
        return _containers(pod)[record.container]["name"] if pod and record.container >= 0 else ""

    def _progress(self, record: PodRecord, stage: str, now: float) -> float:
        """Return the seconds for which a stage has been trained, with earlier attempts."""
        start = record.group_start if record.group else record.started_stage
        return self.trained_seconds.get((record.run, stage), 0.0) + now - start

    def _terminate(self, record: PodRecord, pod: Object, now: float) -> None:
        """SIGTERM: the running stage stores its checkpoint, unless the grace period is too short."""
        if record.container < 0:
            record.ended = now
            self._server.remove("Pod", record.name, namespace=record.namespace)
            return
        stage = _containers(pod)[record.container]["name"]
        grace = pod["metadata"].get("deletionGracePeriodSeconds", 30)
        if record.terminating_since is None:
            record.terminating_since = now
        if now - record.terminating_since < min(self.shutdown_seconds, grace):
            return
        is_stored = self.shutdown_seconds <= grace
        is_training = record.nodes == 1 or bool(record.group)
        # The nodes of a run stop at the same step, and store one checkpoint.
        is_first = not any(peer.exit_code == 143 for peer in self.pods if peer.uid in record.group)
        if is_stored and is_training and is_first:
            self.trained_seconds[record.run, stage] = self._progress(record, stage, record.terminating_since)
        self._end_container(record, stage, 143 if is_stored else 137)
        self._finish(record, pod, "Failed", now)

    def _end_container(self, record: PodRecord, stage: str, code: int) -> None:
        """Let the running container exit, with the termination message that topwork writes."""
        outcome = {0: "done", 143: "stopped"}.get(code, "failed")
        record.exit_code, record.group = code, record.group if code else ()
        fields: dict[str, Any] = {} if record.index else RESULTS.get(stage, {})
        if code:
            fields = {"error": f"{outcome} by the test"}
        if code == 0 and stage == "fine-tune" and record.index == 0:
            fields = fields | self._finish_run(record)
        started = record.states[record.container]["running"]["startedAt"]
        state: Object = {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "startedAt": started}
        state["finishedAt"] = self._clock.timestamp()
        if code != 137 and stage in RESULTS:  # SIGKILL leaves no message
            message = TerminationMessage.model_validate(
                {"stage": stage, "outcome": outcome, "exit_code": code, "run": record.run, **fields}
            )
            state["message"] = message.to_json()
        record.states[record.container] = {"terminated": state}
        self._server.end_log(record.name, stage)

    def _finish_run(self, record: PodRecord) -> dict[str, Any]:
        """Publish a model, or evaluate a run that publishes nothing; return the fields of the termination message."""
        config_map = self._server.get("ConfigMap", record.run, namespace=record.namespace)
        spec = YAML(typ="safe").load(config_map["data"]["job.yaml"])["spec"] if config_map else {}
        if spec.get("publish", {}).get("enabled", True):
            return {"model": self._publish(record.run)}
        metrics = self.evaluate(spec)
        return {"metric": "accuracy", "value": metrics["accuracy"], "metrics": metrics, "dataset": self.dataset}

    def _publish(self, run: str) -> str:
        """Publish the model of a run once; another run of the same job gets the next version."""
        job = run.rpartition("-")[0] or run
        if run not in self._models:
            version = 1 + sum(model.startswith(f"s3://bucket/topwork/models/{job}/") for model in self._models.values())
            self._models[run] = f"s3://bucket/topwork/models/{job}/{version}/"
        return self._models[run]

    def _finish(self, record: PodRecord, pod: Object, phase: str, now: float) -> None:
        record.ended = now
        self._show_states(record, pod, phase)

    def _show_states(self, record: PodRecord, pod: Object, phase: str) -> None:
        statuses = [
            _container_status(container, state)
            for container, state in zip(_containers(pod), record.states, strict=True)
        ]
        count = len(pod["spec"].get("initContainers", []))
        self._patch_status(
            record, phase=phase, initContainerStatuses=statuses[:count], containerStatuses=statuses[count:]
        )

    def _patch_status(self, record: PodRecord, **status: Any) -> None:
        self._server.patch("Pod", record.name, {"status": status}, namespace=record.namespace)

    def _duration(self, stage: str) -> float:
        seconds = self.stage_seconds
        return seconds.get(stage, 0.05) if isinstance(seconds, dict) else seconds


def is_finished(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in FINISHED


def _number_of_nodes(pod: Object) -> int:
    """Return the number of nodes of a run, as the process reads it from its environment."""
    variables = {item["name"]: item.get("value", "") for item in pod["spec"]["containers"][0].get("env", [])}
    return len(variables.get("TOPWORK_NODES", "0").split(","))


def _containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def _container_status(container: Object, state: Object) -> Object:
    return {
        "name": container["name"],
        "image": container.get("image", ""),
        "ready": "running" in state or state.get("terminated", {}).get("exitCode") == 0,
        "restartCount": 0,
        "started": "running" in state,
        "state": state,
    }
