"""The sources that `topwork top` reads runs from: metrics pages of processes, pods of a cluster, or Prometheus."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from topwork.clients.prometheus.scrape import PrometheusClient, Reading, parse_page, read_page, without_credentials
from topwork.cluster.names import RunKind
from topwork.cluster.status.durations import format_duration
from topwork.cluster.status.node_snapshots import combine_nodes
from topwork.cluster.status.snapshot import NodeSnapshot, RunSnapshot
from topwork.cluster.status.snapshot_calculation import ProcessLocation, ReadingHistory, compute_snapshot, node_of
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.status.run_status import RunStatus

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_CONCURRENT_READS = 12
LOOKBACK_SECONDS = 300
"""The lookback period after which Prometheus itself considers a value stale."""
PAGE_STALE_SECONDS = 4.5
"""Age of the last reading after which a process is shown as gone."""
SCRAPE_STALE_SECONDS = 45.0
"""The same for processes that Prometheus scrapes; at least MISSED_SCRAPES times the scrape interval."""
MISSED_SCRAPES = 2.5
MAX_LISTED_RUNS = 8
NO_METRICS = "does not serve metrics of topwork"


class Source(Protocol):
    """A source of runs that can be read repeatedly.

    Attributes:
        has_history: Whether a single read is enough to compute rates.
        empty_message: Message for the user if there are no runs.
    """

    has_history: bool
    empty_message: str

    def read(self, now: float) -> list[RunSnapshot]:
        """Read all runs.

        Args:
            now: Unix time in seconds.

        Raises:
            SettingError: If the source is configured incorrectly.
            UnavailableError: If the source does not answer.
        """


class MetricsPageSource:
    """Processes that serve their metrics at URLs.

    Args:
        urls: URLs of the metrics pages.
        advice: Advice for the user if no run is found.
    """

    has_history = False
    empty_message = "No runs in progress."

    def __init__(self, urls: Sequence[str], advice: str) -> None:
        self._urls, self._advice = urls, advice
        self._histories = {url: ReadingHistory() for url in urls}

    def read(self, now: float) -> list[RunSnapshot]:
        """Read all pages. A process that stops answering remains listed with its last values."""
        problems = [problem for problem in _map_concurrently(self._read_page, self._urls) if problem]
        snapshots = [self._snapshot(url, now) for url, history in self._histories.items() if history.readings]
        if not snapshots:
            raise UnavailableError(f"No runs found: {' '.join(problems)} {self._advice}")
        return combine_nodes(snapshots)

    def _read_page(self, url: str) -> str | None:
        """Read a page into its history, and return the problem if this fails."""
        try:
            reading = read_page(url)
        except (SettingError, UnavailableError) as error:
            return str(error)
        if not reading.label("run"):
            return f"{without_credentials(url)} {NO_METRICS}."
        self._histories[url].add(reading)
        return None

    def _snapshot(self, url: str, now: float) -> RunSnapshot:
        snapshot = compute_snapshot(self._histories[url].readings, now, ProcessLocation(without_credentials(url)))
        return snapshot if snapshot.read_seconds_ago < PAGE_STALE_SECONDS else _mark_unanswered(snapshot)


@dataclass(frozen=True)
class _Container:
    """A container that serves a metrics page."""

    namespace: str
    pod: str
    port: int


class ClusterSource:
    """Runs in a namespace of a cluster, read through the API server.

    Args:
        cluster: The cluster.
        name: Name of a job or run; None selects all unfinished runs.
        kind: Kind of object that represents the runs; None for both kinds.
    """

    has_history = False

    def __init__(self, cluster: "Cluster", name: str | None, kind: RunKind | None = None) -> None:
        self._cluster, self._name, self._kind = cluster, name, kind
        self._histories: dict[_Container, ReadingHistory] = {}
        self.empty_message = f"No runs in progress in namespace {cluster.namespace}."

    def read(self, now: float) -> list[RunSnapshot]:
        """Read the status of the runs from the cluster, and the metrics page of each running container."""
        return _map_concurrently(lambda status: self._snapshot(status, now), self._read_statuses())

    def _read_statuses(self) -> "list[RunStatus]":
        from topwork.cluster.operations.run_lookup import find_run, read_run
        from topwork.cluster.operations.runs import list_runs

        if self._name is None:
            statuses = list_runs(self._cluster, kind=self._kind).statuses
            return [status for status in statuses if not status.is_finished]
        # Each time: the run of a TransferJob changes with its spec.
        return [read_run(self._cluster, find_run(self._cluster, self._name, self._kind))]

    def _snapshot(self, status: "RunStatus", now: float) -> RunSnapshot:
        if status.running_container is None:
            return _snapshot_of_status(status)
        snapshot, problem = self._read_container(status, *status.running_container, now)
        if snapshot is None:
            return replace(_snapshot_of_status(status), reason=problem)
        run = replace(snapshot, state=snapshot.state if status.phase == "running" else status.phase, reason=problem)
        if status.nodes == 1:
            return run
        others = _map_concurrently(lambda node: self._node(status, *node, now), _other_nodes(status))
        return combine_nodes([run, *others])[0]

    def _node(self, status: "RunStatus", index: int, pod: str, stage: str, now: float) -> RunSnapshot:
        """Read another node than node 0."""
        snapshot, problem = self._read_container(status, pod, stage, now)
        if snapshot is not None and snapshot.nodes:
            return replace(snapshot, reason=problem)
        node = NodeSnapshot(index, f"pod {pod}", pod)
        return replace(_snapshot_of_status(status), state="running", reason=problem, nodes=(node,))

    def _read_container(
        self, status: "RunStatus", pod: str, stage: str, now: float
    ) -> tuple[RunSnapshot | None, str | None]:
        """Read a running container; returns its last state, and the problem if it does not answer now."""
        from topwork.clients.kubernetes.errors import NotFoundError
        from topwork.cluster.names import METRICS_PORTS

        port = next(port for name, port in METRICS_PORTS.items() if name == stage)
        container = _Container(status.namespace, pod, port)
        history = self._histories.setdefault(container, ReadingHistory())
        problem = None
        try:
            history.add(parse_page(self._cluster.proxy_get(pod, container.port, "metrics"), time.time()))
        except (NotFoundError, UnavailableError, ValueError) as error:
            problem = str(error)
        if not history.readings or not history.readings[-1].label("run"):
            return None, problem or f"{pod}:{container.port} {NO_METRICS}"
        location = ProcessLocation(f"pod {pod}:{container.port}", status.namespace, pod)
        return compute_snapshot(history.readings, now, location), problem


def _other_nodes(status: "RunStatus") -> list[tuple[int, str, str]]:
    """Return the index, pod and stage of each node other than node 0 that runs a container."""
    running = {
        attempt.index: (attempt.index, attempt.pod, container.stage)
        for attempt in status.attempts
        for container in attempt.containers
        if container.state == "running"
    }
    return [running[index] for index in sorted(running) if index > 0]


def _snapshot_of_status(status: "RunStatus") -> RunSnapshot:
    """Create a snapshot from the status in the cluster only, without metrics."""
    return RunSnapshot(
        run=status.name,
        job=status.job,
        source=f"namespace {status.namespace}",
        namespace=status.namespace,
        pod=status.last_attempt.pod if status.last_attempt else None,
        state=status.phase,
        reason=status.error or status.reason,
        stage=status.stage,
        exit_code=status.exit_code,
    )


class _RunNode(NamedTuple):
    """A node of a run, or the only one."""

    namespace: str
    run: str
    node: int


class PrometheusSource:
    """Runs that Prometheus scraped in the last minutes.

    Args:
        client: Client for the server.
        url: URL of the server, for messages.
        namespace: Namespace of the runs; None selects all namespaces.
    """

    has_history = True

    def __init__(self, client: PrometheusClient, url: str, namespace: str | None) -> None:
        self._client = client
        self._labels = {"namespace": namespace} if namespace else {}
        self._url = without_credentials(url).rstrip("/")
        scope = f" in namespace {namespace}" if namespace else ""
        self.empty_message = (
            f"Prometheus at {self._url} scraped no runs{scope} in the last {format_duration(LOOKBACK_SECONDS)}. "
            f"Its scrape targets: {self._url}/targets"
        )

    def read(self, now: float) -> list[RunSnapshot]:
        """Read the newest process of each run, or of each of its nodes."""
        newest: dict[_RunNode, tuple[ProcessLocation, list[Reading]]] = {}
        for target, readings in self._client.read_runs(self._labels, LOOKBACK_SECONDS).items():
            # Skip outcomes that Prometheus scraped from a Pushgateway.
            if not any(readings[-1].select("stage_running")):
                continue
            key = _RunNode(target.namespace, target.run, node_of(readings[-1]) or 0)
            current = newest.get(key)
            if current is None or current[1][-1].at < readings[-1].at:
                source = f"{self._url}, {target.instance}"
                location = ProcessLocation(source, target.namespace or None, target.pod or None)
                newest[key] = location, readings
        return combine_nodes(
            self._snapshot(location, readings, now) for _, (location, readings) in sorted(newest.items())
        )

    def _snapshot(self, location: ProcessLocation, readings: list[Reading], now: float) -> RunSnapshot:
        snapshot = compute_snapshot(readings, now, location)
        interval = readings[-1].at - readings[-2].at if len(readings) > 1 else 0.0
        timeout = max(SCRAPE_STALE_SECONDS, MISSED_SCRAPES * interval)
        return snapshot if snapshot.read_seconds_ago < timeout else _mark_unanswered(snapshot)


def select_runs(snapshots: Iterable[RunSnapshot], name: str | None) -> list[RunSnapshot]:
    """Select runs by name.

    Args:
        snapshots: All runs.
        name: Name of a run, or of a job to select all its runs; None selects all.

    Raises:
        SettingError: If there is no such run; the message lists the existing ones.
    """
    available = list(snapshots)
    selected = [snapshot for snapshot in available if name in (None, snapshot.run, snapshot.job)]
    if name is not None and not selected:
        runs = sorted({snapshot.run for snapshot in available})
        more = f" and {len(runs) - MAX_LISTED_RUNS} more" if len(runs) > MAX_LISTED_RUNS else ""
        existing = f"Existing runs: {', '.join(runs[:MAX_LISTED_RUNS])}{more}." if runs else "There are no runs."
        raise SettingError(f"Job or run {name} not found. {existing}")
    return selected


def _mark_unanswered(snapshot: RunSnapshot) -> RunSnapshot:
    """Mark a snapshot as outdated, because its process ended or can't be reached."""
    reason = f"last answer {format_duration(snapshot.read_seconds_ago)} ago"
    if snapshot.exit_code is not None:
        return replace(snapshot, reason=reason)
    return replace(snapshot, state="gone", reason=reason)


def _map_concurrently(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply a function to all items in threads; the first exception is raised."""
    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
        return list(pool.map(function, items))
