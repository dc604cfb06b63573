"""Following a run: its states as they come, until it is over."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.operations.run_events import WATCHED, Changed, Events, Failure, Kind, News, Pace, Sources, Survey
from topwork.cluster.status.epochs import Epoch
from topwork.cluster.status.objects import RunObjects, condition, has_begun
from topwork.cluster.status.run_state import RunState, job_state, run_state
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

Role = Literal["training", "prefetch"]


@dataclass(frozen=True)
class Trouble:
    """The API server does not answer; without a message: it does again."""

    message: str | None


@dataclass
class _Seen:
    """Everything that was seen of the run, by kind and UID, and what of it is gone."""

    things: dict[Kind, dict[str, KubernetesObject]] = field(default_factory=lambda: {kind: {} for kind in WATCHED})
    gone: set[str] = field(default_factory=set)
    events: list[KubernetesObject] = field(default_factory=list)

    def take(self, news: News) -> None:
        if isinstance(news, Survey):
            for kind, objects in news.objects.items():
                self.things[kind] |= {thing["metadata"]["uid"]: thing for thing in objects}
            self.gone |= news.gone
        elif isinstance(news, Changed):
            uid = news.object["metadata"]["uid"]
            self.things[news.kind][uid] = news.object
            if news.is_gone:
                self.gone.add(uid)
        elif isinstance(news, Events):
            self.events = news.events

    def known(self, kind: Kind) -> set[str]:
        return set(self.things[kind]) - self.gone


class Following:
    """Follows a run.

    Args:
        cluster: The cluster.
        run: Name of the run.
        role: The Job whose end is the end.
        pace: How often and how long.
    """

    def __init__(self, cluster: "Cluster", run: str, role: Role = "training", pace: Pace | None = None) -> None:
        self._run, self._namespace, self._role, self._pace = run, cluster.namespace, role, pace or Pace()
        self._seen = _Seen()
        self._objects: RunObjects | None = None
        self._epoch: Epoch | None = None
        self._silent_since: float | None = None
        self._sources = Sources(cluster, run, self._pace, self._waiting, self._seen.known)

    def states(self) -> Iterator[RunState | Trouble]:
        """Give a state whenever it changes, and at last the one in which the run is over.

        Yields:
            States, and `Trouble` once when the API server stops to answer and once when it answers again.

        Raises:
            SettingError: If the server refuses to tell, or there's no such run.
            UnavailableError: If the server does not answer for too long.
        """
        before: RunState | None = None
        try:
            for news in self._sources.news():
                yield from self._troubles(news)
                if isinstance(news, Failure):
                    continue
                state = self._take(news)
                if state == before:
                    continue
                if state.is_over:
                    yield from self._last_states(before)
                    return
                yield state
                before = state
        finally:
            self._sources.stop()

    def _take(self, news: News) -> RunState:
        self._seen.take(news)
        if isinstance(news, Epoch):
            self._epoch = news
        state = self._state()
        if state.running and not self._sources.reads(*state.running):
            # What an earlier attempt had reached is no news of this one.
            self._epoch = None
            self._sources.read_log(*state.running)
            state = self._state()
        return state

    def _state(self) -> RunState:
        seen = self._seen
        # The first Job that was seen in a role is the one: a later one of its name is another submission.
        jobs = list(seen.things["Job"].values())
        if not jobs:
            raise SettingError(f"there is no Job of {self._run} in namespace {self._namespace} any more.")
        self._objects = RunObjects(jobs, list(seen.things["Pod"].values()), seen.events, frozenset(seen.gone))
        if self._role == "prefetch":
            return job_state(self._objects, self._objects.job("prefetch") or jobs[0], self._epoch)
        return run_state(self._objects, self._epoch)

    def _last_states(self, before: RunState | None) -> Iterator[RunState]:
        for news in self._sources.last_news():
            self._seen.take(news)
            if before is not None and isinstance(news, Epoch):
                yield replace(before, epoch=news, stage=news.stage, metric=news.metric, value=news.best)
        yield self._state()

    def _troubles(self, news: News) -> Iterator[Trouble]:
        """Tell of trouble once, and of its end; give up when it lasts too long."""
        if isinstance(news, Failure):
            if not isinstance(news.error, UnavailableError):
                raise news.error
            if self._silent_since is None:
                self._silent_since = time.monotonic()
                yield Trouble(str(news.error))
            if time.monotonic() - self._silent_since > self._pace.patience_seconds:
                raise news.error
        elif isinstance(news, Survey) and self._silent_since is not None:
            self._silent_since = None
            yield Trouble(None)

    def _waiting(self) -> RunObjects | None:
        """What is known of the run, as long as a Job is open and no pod of it has begun."""
        objects = self._objects
        if objects is None:
            return None
        alive = [pod for pod in objects.pods if pod["metadata"]["uid"] not in objects.deleted]
        if any(has_begun(pod) and (pod.get("status") or {}).get("phase") != "Failed" for pod in alive):
            return None
        is_open = any(not (condition(job, "Complete") or condition(job, "Failed")) for job in objects.jobs)
        return objects if is_open else None
