"""Where the news of a run come from: watches on its Jobs and pods, its events and logs, each in a thread of its own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import RUN_LABEL
from topwork.cluster.operations.find_runs import read_events
from topwork.cluster.status.epochs import Epoch, read_epoch
from topwork.cluster.status.objects import RunObjects
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

Kind = Literal["Job", "Pod"]
WATCHED: tuple[Kind, Kind] = ("Job", "Pod")


@dataclass(frozen=True)
class Pace:
    """How often and how long, in seconds.

    Attributes:
        survey_seconds: Everything is listed that often, to find what went while no watch was on.
        watch_seconds: How long a watch lasts before another takes over.
        events_seconds: While the run waits, its events are read after that time, then after twice as long, and so on.
        events_most_seconds: The longest such pause.
        retry_seconds: Pause before a server that does not answer is asked again.
        patience_seconds: How long a server may not answer.
        last_lines_seconds: How long to wait for the last lines of a log.
    """

    survey_seconds: float = 20.0
    watch_seconds: float = 600.0
    events_seconds: float = 1.0
    events_most_seconds: float = 10.0
    retry_seconds: float = 5.0
    patience_seconds: float = 1800.0
    last_lines_seconds: float = 3.0


@dataclass(frozen=True)
class Survey:
    """What there is: the objects of the first survey; UIDs that later ones found gone."""

    objects: dict[Kind, list[KubernetesObject]]
    gone: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Changed:
    """An object that appeared, changed or went."""

    kind: Kind
    object: KubernetesObject
    is_gone: bool


@dataclass(frozen=True)
class Events:
    """Events that tell why the run waits."""

    events: list[KubernetesObject]


@dataclass(frozen=True)
class Failure:
    """The server did not answer, or refused."""

    error: Exception


News = Survey | Changed | Events | Epoch | Failure


class Sources:
    """Everything that tells of a run.

    Args:
        cluster: The cluster.
        run: Name of the run.
        pace: How often and how long.
        is_waited_for: Gives what is known of the run as long as it waits; its events are read then.
        known: Gives the UIDs of a kind that are known and not gone.
    """

    def __init__(
        self,
        cluster: "Cluster",
        run: str,
        pace: Pace,
        is_waited_for: Callable[[], RunObjects | None],
        known: Callable[[Kind], set[str]],
    ) -> None:
        self._cluster, self._labels, self._pace = cluster, f"{RUN_LABEL}={run}", pace
        self._is_waited_for, self._known = is_waited_for, known
        self._inbox: SimpleQueue[News] = SimpleQueue()
        self._stop = threading.Event()
        self._logs: dict[tuple[str, str], threading.Thread] = {}

    def news(self) -> Iterator[News]:
        """Give all that is told, as it comes; first a survey or a failure."""
        self._start(self._survey)
        self._start(self._read_events)
        while not self._stop.is_set():
            yield self._inbox.get()

    def stop(self) -> None:
        """Let all threads end; those that wait for the server end with the process."""
        self._stop.set()

    def reads(self, pod: str, container: str) -> bool:
        """Whether a log is read or was."""
        return (pod, container) in self._logs

    def read_log(self, pod: str, container: str) -> None:
        """Read the epochs of a log."""
        self._logs[pod, container] = self._start(lambda: self._read_epochs(pod, container))

    def last_news(self) -> Iterator[News]:
        """Give what is still to be told when the run is over: the ends of its logs, and of its pods.

        The watch on the Job may be ahead of the one on the pods.
        """
        for thread in self._logs.values():
            thread.join(self._pace.last_lines_seconds)
        with suppress(UnavailableError, SettingError):
            for pod in self._cluster.list("Pod", labels=self._labels):
                self._inbox.put(Changed("Pod", pod, is_gone=False))
        with suppress(Empty):
            while True:
                yield self._inbox.get_nowait()

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        # Whoever follows a run ends when it does, whatever a server that does not answer still holds up.
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def _survey(self) -> None:
        """List everything, let the watches begin, and look from time to time what is gone.

        A watch says what goes while it is on; what went between two of them only a list can tell: by what it lacks
        of that which was known before it was asked for.
        """
        begun = False
        while not self._stop.is_set():
            try:
                before = {kind: self._known(kind) for kind in WATCHED}
                found = {kind: self._cluster.list(kind, labels=self._labels) for kind in WATCHED}
            except Exception as error:
                self._inbox.put(Failure(error))
                self._stop.wait(self._pace.retry_seconds)
                continue
            there = {thing["metadata"]["uid"] for things in found.values() for thing in things}
            gone = frozenset(uid for uids in before.values() for uid in uids if uid not in there)
            self._inbox.put(Survey({} if begun else found, gone))
            if not begun:
                for kind in WATCHED:
                    self._start(lambda kind=kind: self._watch(kind))  # type: ignore[misc]
            # What went between the first list and the watches is found soon.
            self._stop.wait(self._pace.survey_seconds if begun else min(1.0, self._pace.survey_seconds))
            begun = True

    def _watch(self, kind: Kind) -> None:
        while not self._stop.is_set():
            try:
                for change in self._cluster.watch(kind, labels=self._labels, seconds=self._pace.watch_seconds):
                    self._inbox.put(Changed(kind, change.object, change.type == "DELETED"))
                    if self._stop.is_set():
                        return
            except UnavailableError:
                # The survey tells of it, and of its end.
                self._stop.wait(self._pace.retry_seconds)
            except Exception as error:
                self._inbox.put(Failure(error))
                return

    def _read_events(self) -> None:
        pause, before = 0.05, None
        while not self._stop.wait(pause):
            waiting = self._is_waited_for()
            if waiting is None:
                continue
            with suppress(UnavailableError):
                alive = [pod for pod in waiting.pods if pod["metadata"]["uid"] not in waiting.deleted]
                self._inbox.put(Events(read_events(self._cluster, waiting.jobs, alive)))
            now = [thing["metadata"].get("resourceVersion") for thing in (*waiting.jobs, *waiting.pods)]
            pause = self._pace.events_seconds if now != before else min(2 * pause, self._pace.events_most_seconds)
            before = now

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
