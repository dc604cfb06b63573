"""A cluster with the reconciler of the controller, for tests that decide themselves when watches and timers fire.

world = ControlledCluster(api_server, cluster)
world.apply(sample_objects.spec())
world.settle()                       # until neither the reconciler nor Kubernetes changes anything
world.advance(60)                    # the stages of pods take 60 s
assert world.status()["state"] == "Running"
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import sample_objects
from api_server import NAMESPACE, ApiServer
from simulated_controllers import SimulatedControllers

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.controller.dispatch import Dispatcher
from topwork.cluster.controller.object_cache import Key
from topwork.cluster.controller.reconciler import ReconcilerSettings
from topwork.cluster.controller.searches.search_cache import SEARCH, SearchKey
from topwork.cluster.definition import TRANSFER_SEARCH, definition
from topwork.errors import TopworkError

Object = dict[str, Any]
WATCHED = {"TransferSearch", "TransferJob", "Job", "Pod"}
STAGE_SECONDS, SHUTDOWN_SECONDS = 60.0, 10.0
MAX_ROUNDS = 200
USER = "kubectl"


class ControlledCluster:
    """A reconciler over the tests' API server.

    Attributes:
        errors: Errors that the reconciler raised.
        delays: What the last call returned for each object, which would be called again after that time.
        queue: TransferJobs and TransferSearches with a change that the reconciler has not seen.
    """

    def __init__(self, server: ApiServer, cluster: Cluster, **simulation: Any) -> None:
        self.server, self.cluster = server, cluster
        server.install_crd(definition())
        server.install_crd(definition(TRANSFER_SEARCH))
        self.kubernetes = SimulatedControllers(
            server, **{"stage_seconds": STAGE_SECONDS, "shutdown_seconds": SHUTDOWN_SECONDS} | simulation
        )
        self.errors: list[TopworkError] = []
        self.restart()

    # ── The controller ──────────────────────────────────────────────────────────────────────────────────────────────

    def restart(self) -> None:
        """Replace the controller by a new process, which lists all objects."""
        settings = ReconcilerSettings(status_interval_seconds=0.0, metrics_timeout_seconds=0.2, now=self.now)
        self.dispatcher = Dispatcher(self.controller_cluster(), settings)
        self.delays: dict[Key | SearchKey, float | None] = {}
        self.position = len(self.server.objects.history)
        self.queue: list[Key | SearchKey] = []
        for obj in self.server.objects.list_all():
            if obj["kind"] in WATCHED:
                self._update("ADDED", obj)

    def controller_cluster(self) -> Cluster:
        """Connection of the controller."""
        return self.cluster

    def now(self) -> datetime:
        return datetime.fromisoformat(self.kubernetes.clock.timestamp())

    def deliver(self, count: int | None = None) -> None:
        """Deliver changes, in order, to the cache: all of them, or at most `count`."""
        history = self.server.objects.history
        end = len(history) if count is None else min(len(history), self.position + count)
        for change in history[self.position : end]:
            if change.kind in WATCHED:
                self._update(change.type, change.object)
        self.position = end

    def _update(self, event_type: str, obj: Object) -> None:
        self.queue += [key for key in self.dispatcher.update(event_type, obj) if key not in self.queue]

    def reconcile(self, name: str = "flowers") -> None:
        """Call the reconciler once for a TransferJob."""
        self.reconcile_key(Key(NAMESPACE, name))

    def reconcile_search(self, name: str = "flowers") -> None:
        """Call the reconciler once for a TransferSearch."""
        self.reconcile_key(SearchKey(NAMESPACE, SEARCH, name))

    def reconcile_key(self, key: Key | SearchKey) -> None:
        """Call the reconciler once."""
        if key in self.queue:
            self.queue.remove(key)
        try:
            self.delays[key] = self.dispatcher.reconcile(key)
        except TopworkError as error:
            self.errors.append(error)
            self.delays[key] = 1.0

    def settle(self) -> None:
        """Let the controller and Kubernetes act until nothing changes."""
        for _ in range(MAX_ROUNDS):
            self.kubernetes.settle()
            self.deliver()
            if not self.queue:
                return
            for key in [*self.queue]:
                self.reconcile_key(key)
        raise AssertionError(f"still busy after {MAX_ROUNDS} rounds: {self.status()}")

    def advance(self, seconds: float, step: float = 20.0) -> None:
        """Move the clock in steps. After each one, timers fire, and everything settles."""
        self.settle()
        end = self.kubernetes.clock.offset + seconds
        while (left := end - self.kubernetes.clock.offset) > 0:
            self.kubernetes.clock.offset += min(step, left)
            self.fire_timers()
            self.settle()

    def fire_timers(self) -> None:
        """Call the reconciler for everything that has to be looked at again without a change."""
        for key, delay in [*self.delays.items()]:
            if delay is not None:
                self.reconcile_key(key)

    # ── The user ────────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, spec: Object) -> Object:
        """Apply a TransferJob, as kubectl does."""
        return self.cluster.apply(spec, manager=USER, force=True)

    def change(self, change: Callable[[Object], Any], name: str = "flowers") -> Object:
        """Edit a TransferJob, as `kubectl edit` does."""
        stored = self.cluster.get("TransferJob", name)
        assert stored is not None
        change(stored)
        return self.cluster.replace(stored)

    def set_compute(self, **values: Any) -> None:
        self.change(lambda job: job["spec"]["compute"].update(values))

    def suspend(self, value: bool = True) -> None:
        self.change(lambda job: job["spec"].update(suspend=value))

    def annotate(self, **annotations: str) -> None:
        values = {f"topwork.dev/{key}": value for key, value in annotations.items()}
        self.change(lambda job: job["metadata"].setdefault("annotations", {}).update(values))

    def delete(self, name: str = "flowers") -> None:
        self.cluster.delete("TransferJob", name)

    # ── What there is ───────────────────────────────────────────────────────────────────────────────────────────────

    def status(self, name: str = "flowers") -> Object:
        stored = self.server.get("TransferJob", name)
        return (stored or {}).get("status") or {}

    def condition(self, kind: str, name: str = "flowers") -> Object:
        return next(item for item in self.status(name)["conditions"] if item["type"] == kind)

    def jobs(self) -> list[str]:
        """Names of all Jobs."""
        return [job["metadata"]["name"] for job in self.server.list("Job")]

    def job(self, name: str | None = None) -> Object:
        job = self.server.get("Job", name or self.status()["run"])
        assert job is not None
        return job

    def events(self) -> list[tuple[str, str]]:
        """Reason and message of the events about TransferJobs."""
        events = [event for event in self.server.list("Event") if event["involvedObject"]["kind"] == "TransferJob"]
        events.sort(key=lambda event: int(event["metadata"]["resourceVersion"]))
        return [(event["reason"], event["message"]) for event in events]

    def active_pods(self) -> list[str]:
        return [pod.name for pod in self.kubernetes.pods if pod.ended is None]


def run_of(**compute: Any) -> str:
    return sample_objects.transfer_job(**compute).run
