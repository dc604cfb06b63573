"""Where `topwork top` reads runs: ports of processes, pods of a cluster, Prometheus."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from topwork.cli.output.run_status import duration
from topwork.cli.top.calculation import History, Place, figures
from topwork.cli.top.snapshot import Figures
from topwork.clients.prometheus.scrape import Prometheus, Reading, parse_page, read_page, shown
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.status.run_state import RunState

One = TypeVar("One")
Made = TypeVar("Made")

AT_ONCE = 12
LOOK_BACK_SECONDS = 300
"""How long Prometheus itself takes a value for current."""
UNANSWERED_SECONDS = 4.5
"""A process whose page answered so long ago and not since has gone."""
UNSCRAPED_SECONDS = 45.0
"""The same for what Prometheus scrapes, or so many times the time between two scrapes."""
MISSED_SCRAPES = 2.5
MOST_NAMED = 8
NO_METRICS = "serves no metrics of topwork"


class Source(Protocol):
    """A place to read runs from, again and again.

    Attributes:
        remembers: Whether one reading is enough for rates.
        nothing: What to say where there is no run.
    """

    remembers: bool
    nothing: str

    def read(self, now: float) -> list[Figures]:
        """Read all runs.

        Args:
            now: Unix time in seconds.

        Raises:
            SettingError: If nothing can be read as it is set up.
            UnavailableError: If nothing answers.
        """


class Pages:
    """Processes that serve their metrics at URLs.

    Args:
        urls: Of the pages.
        advice: What to do where nothing is found.
    """

    remembers = False
    nothing = "No run is under way."

    def __init__(self, urls: Sequence[str], advice: str) -> None:
        self._urls, self._advice = urls, advice
        self._histories = {url: History() for url in urls}

    def read(self, now: float) -> list[Figures]:
        """Read all pages; what answered once stays, with the time since which it does not."""
        problems = [problem for problem in _all(self._look, self._urls) if problem]
        found = [self._figures(url, now) for url, history in self._histories.items() if history.readings]
        if not found:
            raise UnavailableError(f"No run can be read: {' '.join(map(str, problems))} {self._advice}")
        return found

    def _look(self, url: str) -> str | None:
        """Read a page; gives the problem, if there is one."""
        try:
            reading = read_page(url)
        except (SettingError, UnavailableError) as error:
            return str(error)
        if not reading.label("run"):
            return f"{shown(url)} {NO_METRICS}."
        self._histories[url].add(reading)
        return None

    def _figures(self, url: str, now: float) -> Figures:
        found = figures(self._histories[url].readings, now, Place(shown(url)))
        return found if found.read_seconds_ago < UNANSWERED_SECONDS else _silent(found)


@dataclass(frozen=True)
class _Container:
    """A container whose page is read."""

    namespace: str
    pod: str
    port: int


class Pods:
    """Runs in a namespace of a cluster, read through the API server.

    Args:
        cluster: The cluster.
        run: Only this run; None: all that are not over.
    """

    remembers = False

    def __init__(self, cluster: "Cluster", run: str | None) -> None:
        self._cluster, self._run = cluster, run
        self._histories: dict[_Container, History] = {}
        self.nothing = f"No run is under way in namespace {cluster.namespace}."

    def read(self, now: float) -> list[Figures]:
        """Read what the cluster says of the runs, and the page of each container that runs."""
        return _all(lambda state: self._figures(state, now), self._states())

    def _states(self) -> "list[RunState]":
        from topwork.cluster.operations.find_runs import read_run
        from topwork.cluster.operations.list_runs import read_states
        from topwork.cluster.status.run_state import run_state

        if self._run is None:
            return [state for state in read_states(self._cluster) if not state.is_over]
        objects = read_run(self._cluster, self._run)
        if not objects.jobs:
            raise SettingError(f"{self._run} has been deleted from namespace {self._cluster.namespace}.")
        return [run_state(objects)]

    def _figures(self, state: "RunState", now: float) -> Figures:
        from topwork.clients.kubernetes.errors import MissingError
        from topwork.cluster.names import METRICS_PORTS

        if state.running is None:
            return _of_state(state)
        pod, stage = state.running
        port = next(port for name, port in METRICS_PORTS.items() if name == stage)
        container = _Container(state.namespace, pod, port)
        history = self._histories.setdefault(container, History())
        problem = None
        try:
            history.add(parse_page(self._cluster.page(pod, container.port, "metrics"), time.time()))
        except (MissingError, UnavailableError, ValueError) as error:
            problem = str(error)
        if not history.readings or not history.readings[-1].label("run"):
            return replace(_of_state(state), reason=problem or f"{pod}:{container.port} {NO_METRICS}")
        found = figures(history.readings, now, Place(f"pod {pod}:{container.port}", state.namespace, pod))
        return replace(found, state=found.state if state.phase == "running" else state.phase, reason=problem)


def _of_state(state: "RunState") -> Figures:
    """What the cluster says of a run, where no process tells."""
    last = state.attempts[-1].pod if state.attempts else None
    return Figures(
        run=state.run,
        job=state.job,
        source=f"namespace {state.namespace}",
        namespace=state.namespace,
        pod=last,
        state=state.phase,
        reason=state.error or state.reason,
        stage=state.stage,
        exit_code=state.exit_code,
    )


class Scrapes:
    """Runs that a Prometheus has scraped within the last minutes.

    Args:
        prometheus: It.
        url: Its address, for messages.
        namespace: Only runs of this namespace.
    """

    remembers = True

    def __init__(self, prometheus: Prometheus, url: str, namespace: str | None) -> None:
        self._prometheus = prometheus
        self._labels = {"namespace": namespace} if namespace else {}
        self._url = shown(url).rstrip("/")
        where = f" of namespace {namespace}" if namespace else ""
        self.nothing = (
            f"Prometheus at {self._url} has scraped no run{where} in the last {duration(LOOK_BACK_SECONDS)}. "
            f"What it scrapes: {self._url}/targets"
        )

    def read(self, now: float) -> list[Figures]:
        """Read the newest process of each run."""
        newest: dict[tuple[str, str], tuple[Place, list[Reading]]] = {}
        for target, readings in self._prometheus.readings(self._labels, LOOK_BACK_SECONDS).items():
            # The outcomes at a Pushgateway are no process.
            if not any(readings[-1].of("stage_running")):
                continue
            known = newest.get((target.namespace, target.run))
            if known is None or known[1][-1].at < readings[-1].at:
                place = Place(f"{self._url}, {target.instance}", target.namespace or None, target.pod or None)
                newest[target.namespace, target.run] = place, readings
        return [self._figures(place, readings, now) for _, (place, readings) in sorted(newest.items())]

    def _figures(self, place: Place, readings: list[Reading], now: float) -> Figures:
        found = figures(readings, now, place)
        between = readings[-1].at - readings[-2].at if len(readings) > 1 else 0.0
        return found if found.read_seconds_ago < max(UNSCRAPED_SECONDS, MISSED_SCRAPES * between) else _silent(found)


def chosen(found: Iterable[Figures], name: str | None) -> list[Figures]:
    """Choose the runs that a user names.

    Args:
        found: All runs.
        name: Name of a run, or of a job for all its runs; None: all.

    Raises:
        SettingError: If there is none of that name; it names those that there are.
    """
    there = list(found)
    named = [one for one in there if name in (None, one.run, one.job)]
    if name is not None and not named:
        runs = sorted({one.run for one in there})
        more = f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else ""
        known = f"There are: {', '.join(runs[:MOST_NAMED])}{more}." if runs else "There is none at all."
        raise SettingError(f"No job or run {name} can be read. {known}")
    return named


def _silent(found: Figures) -> Figures:
    """A process that ended, or that can't be reached: what it told last."""
    reason = f"last answer {duration(found.read_seconds_ago)} ago"
    return replace(found, reason=reason) if found.exit_code is not None else replace(found, state="gone", reason=reason)


def _all(work: Callable[[One], Made], things: Sequence[One]) -> list[Made]:
    """Do slow things at once; the first that raises ends it."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(work, things))
