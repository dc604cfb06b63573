"""Following a run: its states as they come, from watches on its Jobs and pods, its events and its log."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal

from topwork.cluster.epochs import Epoch, read_epoch
from topwork.cluster.names import ROLE_LABEL, RUN_LABEL
from topwork.cluster.objects import Manifest, RunObjects, condition, has_begun, label
from topwork.cluster.runs import read_events
from topwork.cluster.state import RunState, job_state, run_state
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.edge.kubernetes import Cluster

Role = Literal["training", "prefetch"]
WATCHED = ("Job", "Pod")


@dataclass(frozen=True)
class Pace:
    """How often and how long, in seconds.

    Attributes:
        watch_seconds: A watch lasts that long; then everything is listed again, which heals what a break has lost.
        events_seconds: Events are read that often while the run waits.
        retry_seconds: Pause before a server that does not answer is asked again.
        patience_seconds: How long a server may not answer.
        last_lines_seconds: How long to wait for the last lines of a log.
    """

    watch_seconds: float = 120.0
    events_seconds: float = 4.0
    retry_seconds: float = 5.0
    patience_seconds: float = 1800.0
    last_lines_seconds: float = 3.0


@dataclass(frozen=True)
class Trouble:
    """The API server does not answer; None as message when it does again."""

    message: str | None


@dataclass
class _Snapshot:
    kind: str
    objects: list[Manifest]


@dataclass
class _Changed:
    kind: str
    type: str
    object: Manifest


@dataclass
class _Seen:
    """Everything that was seen of the run, by kind and UID."""

    things: dict[str, dict[str, Manifest]] = field(default_factory=lambda: {kind: {} for kind in WATCHED})
    deleted: set[str] = field(default_factory=set)
    listed: set[str] = field(default_factory=set)
    events: list[Manifest] = field(default_factory=list)

    def take(self, news: _Snapshot | _Changed) -> None:
        known = self.things[news.kind]
        if isinstance(news, _Snapshot):
            now = {thing["metadata"]["uid"]: thing for thing in news.objects}
            self.deleted |= known.keys() - now.keys()
            self.deleted -= now.keys()
            known |= now
            self.listed.add(news.kind)
        else:
            uid = news.object["metadata"]["uid"]
            known[uid] = news.object
            if news.type == "DELETED":
                self.deleted.add(uid)

    def objects(self, role: Role, first: str | None) -> RunObjects:
        """The Job that was first seen in a role and all else; a second Job of its name is another submission."""
        jobs = [job for uid, job in self.things["Job"].items() if label(job, ROLE_LABEL) != role or uid == first]
        return RunObjects(jobs, list(self.things["Pod"].values()), self.events, frozenset(self.deleted))


class Following:
    """Follows a run until it is over.

    Args:
        cluster: The cluster.
        run: Name of the run.
        role: The Job whose end is the end.
        pace: How often and how long.
    """

    def __init__(self, cluster: "Cluster", run: str, role: Role = "training", pace: Pace | None = None) -> None:
        self._cluster, self._run, self._role, self._pace = cluster, run, role, pace or Pace()
        self._inbox: SimpleQueue[object] = SimpleQueue()
        self._stop = threading.Event()
        self._seen = _Seen()
        self._first: str | None = None
        self._epoch: Epoch | None = None
        self._logs: dict[tuple[str, str], threading.Thread] = {}
        self._wanted: RunObjects | None = None
        self._silent: dict[str, float] = {}

    def states(self) -> Iterator[RunState | Trouble]:
        """Give a state whenever it changes, and at last the one in which the run is over.

        Yields:
            States, and `Trouble` once when the API server stops to answer and once when it answers again.

        Raises:
            SettingError: If the server refuses to tell, or there's no such run.
            UnavailableError: If the server does not answer for too long.
        """
        for kind in WATCHED:
            self._start(lambda kind=kind: self._watch(kind))  # type: ignore[misc]
        self._start(self._read_events)
        try:
            before: RunState | None = None
            for news in iter(self._inbox.get, None):
                yield from self._troubles(news)
                state = self._take(news)
                if state is None or state == before:
                    continue
                if state.is_over:
                    yield from self._last_lines(before)
                    yield self._state() or state
                    return
                self._read_log(state)
                yield state
                before = state
        finally:
            self._stop.set()

    def _take(self, news: object) -> RunState | None:
        if isinstance(news, Epoch):
            self._epoch = news
        elif isinstance(news, list):
            self._seen.events = news
        elif isinstance(news, _Snapshot | _Changed):
            self._seen.take(news)
        return self._state()

    def _state(self) -> RunState | None:
        """The state, once Jobs and pods were listed."""
        if self._seen.listed != set(WATCHED):
            return None
        jobs = [job for job in self._seen.things["Job"].values() if label(job, ROLE_LABEL) == self._role]
        alive = [job for job in jobs if job["metadata"]["uid"] not in self._seen.deleted]
        if self._first is None and (alive or jobs):
            self._first = (alive or jobs)[-1]["metadata"]["uid"]
        objects = self._seen.objects(self._role, self._first)
        self._wanted = objects
        if not objects.jobs:
            raise SettingError(
                f"there is no Job of the run {self._run} in namespace {self._cluster.namespace} any more."
            )
        if self._role == "prefetch":
            job = objects.job("prefetch")
            return job_state(objects, job, self._epoch) if job else None
        return run_state(objects, self._epoch)

    def _last_lines(self, before: RunState | None) -> Iterator[RunState]:
        """The epochs that the log still holds when the run is over."""
        until = time.monotonic() + self._pace.last_lines_seconds
        for thread in self._logs.values():
            thread.join(max(0.0, until - time.monotonic()))
        with suppress(Empty):
            while before is not None:
                news = self._inbox.get_nowait()
                if isinstance(news, Epoch):
                    self._epoch = news
                    yield replace(before, epoch=news, stage=news.stage, metric=news.metric, value=news.best)

    def _troubles(self, news: object) -> Iterator[Trouble]:
        """Tell of trouble once, and of its end; give up when it lasts too long."""
        if isinstance(news, _Failed):
            if not isinstance(news.error, UnavailableError):
                raise news.error
            if not self._silent:
                yield Trouble(str(news.error))
            since = self._silent.setdefault(news.who, time.monotonic())
            if time.monotonic() - since > self._pace.patience_seconds:
                raise UnavailableError(
                    f"{news.error} The job goes on: come back with topwork status {self._run} --follow"
                )
        elif isinstance(news, _Snapshot) and news.kind in self._silent:
            del self._silent[news.kind]
            if not self._silent:
                yield Trouble(None)

    # What follows runs in threads of its own.

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def _watch(self, kind: str) -> None:
        labels = f"{RUN_LABEL}={self._run}"
        while not self._stop.is_set():
            try:
                self._inbox.put(_Snapshot(kind, self._cluster.list(kind, labels=labels)))
                for change in self._cluster.watch(kind, labels=labels, seconds=self._pace.watch_seconds):
                    self._inbox.put(_Changed(kind, change.type, change.object))
                    if self._stop.is_set():
                        return
            except Exception as error:  # whatever it is, it belongs to who follows
                self._inbox.put(_Failed(kind, error))
                self._stop.wait(self._pace.retry_seconds)

    def _read_events(self) -> None:
        """Events tell why a run waits: they are read as long as it does."""
        while not self._stop.is_set():
            wanted = self._wanted
            if wanted is not None and _waits(wanted):
                # The watches tell of trouble.
                with suppress(UnavailableError):
                    alive = [pod for pod in wanted.pods if pod["metadata"]["uid"] not in wanted.deleted]
                    self._inbox.put(read_events(self._cluster, wanted.jobs, alive))
            self._stop.wait(self._pace.events_seconds if wanted is not None else 0.05)

    def _read_log(self, state: RunState) -> None:
        if state.running is not None and state.running not in self._logs:
            pod, container = state.running
            self._logs[pod, container] = self._start(lambda: self._read_epochs(pod, container))

    def _read_epochs(self, pod: str, container: str) -> None:
        epoch: Epoch | None = None
        while not self._stop.is_set():
            try:
                for line in self._cluster.logs(pod, container, follow=True):
                    found = read_epoch(line, epoch)
                    # After a break the log is read from its start again.
                    if found and (epoch is None or found.epoch > epoch.epoch):
                        epoch = found
                        self._inbox.put(found)
            except SettingError:
                return  # an account that must not read logs still follows the rest
            except UnavailableError:
                self._stop.wait(self._pace.retry_seconds)
            else:
                return


@dataclass
class _Failed:
    who: str
    error: Exception


def _waits(objects: RunObjects) -> bool:
    """Whether a Job is open and no pod of it has begun."""
    alive = [pod for pod in objects.pods if pod["metadata"]["uid"] not in objects.deleted]
    if any(has_begun(pod) and (pod.get("status") or {}).get("phase") != "Failed" for pod in alive):
        return False
    return any(not (condition(job, "Complete") or condition(job, "Failed")) for job in objects.jobs)
