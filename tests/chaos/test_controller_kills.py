"""The controller receives SIGKILL at random moments; all objects and statuses are as without kills.

TOPWORK_LONG=1: ten rounds of 20 kills instead of one.
"""

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from api_server import ApiServer
from controller_process import Controller, until
from sample_objects import CPU_SPEC
from sample_searches import evaluate, search
from simulated_controllers import SimulatedControllers

from topwork.clients.kubernetes.cluster import Cluster, ClusterSettings, connect
from topwork.cluster.controller.searches.config_map_journal import decode_events
from topwork.cluster.definition import TRANSFER_SEARCH, definition

KILLS = 20
ROUNDS = 10 if os.environ.get("TOPWORK_LONG") else 1
FIRST_SEED = int(os.environ.get("TOPWORK_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
# A restarted container continues with the Lease of its pod.
IN_POD = {"KUBERNETES_SERVICE_HOST": "127.0.0.1"}
WRITES = {"POST", "PUT", "PATCH", "DELETE"}
WAIT_SECONDS = 320.0
TIMES = {"startTime", "completionTime", "eta", "progress", "attemptHistory", "jobUid", "gpuSeconds", "waitingFor"}
Object = dict[str, Any]
SPEC: Object = CPU_SPEC | {"transfer": {"epochs": 3}}


class Scenario:
    """TransferJobs and a TransferSearch, and what their users do with them while the controller runs or is dead."""

    def __init__(self, server: ApiServer, cluster: Cluster) -> None:
        self._server, self._cluster = server, cluster
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        # TransferJobs whose stages don't end before their user has seen that they run, and has acted.
        self.held: set[str] = set()

    def start(self, number: int) -> None:
        """Apply a TransferJob, on one or two nodes, and act on it as soon as it runs."""
        behavior = (self._wait, self._suspend, self._change, self._cancel)[number % 4]
        name = f"job-{number}"
        self.held.add(name)
        thread = threading.Thread(target=self._run, args=(behavior, name))
        thread.start()
        self._threads.append(thread)

    def start_search(self) -> None:
        """Apply a TransferSearch, and wait until it is complete.

        The parameters of its trials do not depend on the order in which parallel trials end.
        """
        thread = threading.Thread(target=self._run_search)
        thread.start()
        self._threads.append(thread)

    def _run_search(self) -> None:
        try:
            self._cluster.apply(search(trials=6, parallel=2, sampler="random"), manager="kubectl")
            self._wait_for("flowers", "Complete", kind="TransferSearch")
        except BaseException as error:
            self._errors.append(error)
            error.add_note(f"search: {(self._server.get('TransferSearch', 'flowers') or {}).get('status')}")

    def _run(self, behavior: Any, name: str) -> None:
        try:
            self._apply(name)
            behavior(name)
        except BaseException as error:
            self._errors.append(error)
            stored = self._server.get("TransferJob", name) or {}
            error.add_note(f"{name}: {stored.get('status')}")

    def join(self) -> None:
        """Wait until all TransferJobs are finished."""
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _apply(self, name: str, *, metadata: Object | None = None, **spec: Any) -> None:
        nodes = {"compute": {"gpus": 0, "nodes": 2}} if int(name.rpartition("-")[2]) % 3 == 0 else {}
        obj = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "spec": SPEC | nodes | spec}
        self._cluster.apply(obj | {"metadata": {"name": name} | (metadata or {})}, manager="kubectl")

    def _wait_for(self, name: str, *states: str, kind: str = "TransferJob") -> Object:
        def find() -> Object | None:
            status = self._server.get(kind, name).get("status") or {}
            return status if status.get("state") in states else None

        return until(find, f"state {states} of {name}", WAIT_SECONDS)

    def _wait(self, name: str) -> None:
        self._wait_for(name, "Running")
        self.held.remove(name)
        self._wait_for(name, "Complete")

    def _suspend(self, name: str) -> None:
        self._wait_for(name, "Running")
        self._apply(name, suspend=True)
        self._wait_for(name, "Suspended")
        self._apply(name)
        self._wait_for(name, "Running")
        self.held.remove(name)
        self._wait_for(name, "Complete")

    def _change(self, name: str) -> None:
        first = self._wait_for(name, "Running")["run"]
        self._apply(name, transfer={"epochs": 5})
        until(lambda: self._wait_for(name, "Running")["run"] != first, f"new run of {name}", WAIT_SECONDS)
        self.held.remove(name)
        self._wait_for(name, "Complete")

    def _cancel(self, name: str) -> None:
        run = self._wait_for(name, "Running")["run"]
        self._apply(name, metadata={"annotations": {"topwork.dev/cancel": run}})
        self._wait_for(name, "Cancelled")


class SimulatedRun:
    """API server, simulated controllers and scenario of one run of the test."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.server = ApiServer(crds=[definition(), definition(TRANSFER_SEARCH)])
        self.controllers = SimulatedControllers(self.server, stage_seconds=0.3, shutdown_seconds=0.1)
        self.kubeconfig = self.server.kubeconfig(directory / "kubeconfig")
        self.controllers.kubelet.evaluate = evaluate
        self._run_stage = self.controllers.kubelet._run_stage
        self.controllers.kubelet._run_stage = self._run_unless_held
        self.scenario = Scenario(self.server, connect(ClusterSettings(kubeconfig=str(self.kubeconfig))))

    def __enter__(self) -> "SimulatedRun":
        self.server.__enter__()
        self.controllers.__enter__()
        return self

    def __exit__(self, *arguments: object) -> None:
        self.controllers.__exit__(*arguments)
        self.server.__exit__(*arguments)

    def _run_unless_held(self, record: Any, pod: Object, now: float) -> None:
        if pod["metadata"]["labels"]["topwork.dev/job"] not in self.scenario.held:
            self._run_stage(record, pod, now)

    def outcome(self) -> dict[str, Any]:
        """All objects and statuses, without times and generated names."""
        jobs = {pod.job_uid: (pod.run, pod.role) for pod in self.controllers.pods}
        return {
            "statuses": {obj["metadata"]["name"]: status_of(obj) for obj in self.server.list("TransferJob")},
            "jobs": {obj["metadata"]["name"]: job_of(obj) for obj in self.server.list("Job")},
            "searches": {obj["metadata"]["name"]: status_of(obj) for obj in self.server.list("TransferSearch")},
            "journal": self._journal(),
            "config maps": {obj["metadata"]["name"]: obj["data"] for obj in self.server.list("ConfigMap")},
            "network": sorted(
                (kind, obj["metadata"]["name"])
                for kind in ("Service", "NetworkPolicy")
                for obj in self.server.list(kind)
            ),
            "Jobs of each run": Counter(jobs.values()),
            "pods of each run": Counter(pod.run for pod in self.controllers.pods),
            "events": Counter(
                (event["involvedObject"]["name"], event["reason"])
                for event in self.server.list("Event")
                # A trial can end before the next controller sees that it runs.
                if not (event["involvedObject"]["name"].startswith("flowers-") and event["reason"] == "Running")
            ),
        }

    def _journal(self) -> Counter[str]:
        """Events of the search, without what depends on the clock; parallel trials end in any order."""
        (config_map,) = [obj for obj in self.server.list("ConfigMap") if "binaryData" in obj]
        kept = ("event", "number", "params", "state", "epochs", "run", "value", "error", "uri")
        events = [{key: event.get(key) for key in kept} for event in decode_events(config_map)]
        return Counter(map(str, events))


def status_of(obj: Object) -> Object:
    status = {key: value for key, value in obj["status"].items() if key not in TIMES}
    conditions = [
        {key: value for key, value in condition.items() if key != "lastTransitionTime"}
        for condition in status.pop("conditions")
    ]
    return status | {"conditions": sorted(conditions, key=lambda condition: condition["type"])}


def job_of(obj: Object) -> Object:
    owners = [(owner["kind"], owner["name"], owner["controller"]) for owner in obj["metadata"]["ownerReferences"]]
    template = obj["spec"]["template"]["spec"]
    return {"owners": owners, "labels": obj["metadata"]["labels"], "containers": template["containers"]}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome without kills."""
    with SimulatedRun(tmp_path_factory.mktemp("expected") / "cluster") as cluster:
        with Controller(cluster.kubeconfig, **IN_POD) as controller:
            cluster.scenario.start_search()
            for number in range(KILLS):
                cluster.scenario.start(number)
            cluster.scenario.join()
            assert controller.stop() == 0
            assert controller.errors == []
        return cluster.outcome()


def writes(server: ApiServer) -> int:
    return sum(request.method in WRITES for request in list(server.requests))


def kill_at_random(cluster: SimulatedRun, controller: Controller, moments: random.Random) -> str:
    """Kill the process while it starts, after some time, or after some writes; return the kind of moment."""
    kind = moments.choice(("start", "time", "write", "write", "write"))
    if kind == "start":
        time.sleep(moments.uniform(0.0, 1.5))
    else:
        controller.wait_until_leading()
        count = writes(cluster.server) + moments.randint(1, 6)
        deadline = time.monotonic() + (moments.uniform(0.0, 1.0) if kind == "time" else 2.0)
        while time.monotonic() < deadline and (kind == "time" or writes(cluster.server) < count):
            time.sleep(0.001)
    controller.kill()
    return kind


@pytest.mark.parametrize("number", range(ROUNDS))
def test_kills_of_the_controller_change_nothing(tmp_path: Path, expected: dict[str, Any], number: int) -> None:
    seed = FIRST_SEED + number
    moments = random.Random(seed)
    kinds: Counter[str] = Counter()
    started = time.monotonic()
    with SimulatedRun(tmp_path / "cluster") as cluster:
        cluster.scenario.start_search()
        for job in range(KILLS):
            cluster.scenario.start(job)
            kinds[kill_at_random(cluster, Controller(cluster.kubeconfig, **IN_POD), moments)] += 1
        with Controller(cluster.kubeconfig, **IN_POD) as controller:
            try:
                cluster.scenario.join()
            except BaseException as error:
                error.add_note(f"seed {seed}, log of the controller: {controller.messages[-30:]}")
                raise
            assert controller.stop() == 0
        outcome = cluster.outcome()
        overlapping = cluster.controllers.overlapping_pods()
    print(
        f"\n{KILLS} kills of the controller ({', '.join(f'{count} at a {kind}' for kind, count in kinds.items())}), "
        f"seed {seed}: {len(outcome['statuses'])} TransferJobs, {sum(outcome['Jobs of each run'].values())} Jobs, "
        f"{sum(outcome['pods of each run'].values())} pods, {len(overlapping)} overlapping pods, "
        f"{time.monotonic() - started:.0f} s"
    )
    assert overlapping == []
    for part, content in expected.items():
        assert outcome[part] == content, f"{part}, seed {seed}"
