"""Reconciles a TransferSearch: chooses its trials, runs them as TransferJobs, and publishes the best one.

Every call starts from the journal of the search and from what the cluster contains, so that the controller can be
killed and started again at any time. The order is: journal, TransferJob, event, status. What the journal lists as
running must exist, and is created again if it does not.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from topwork.cluster.controller.conditions import Fact
from topwork.cluster.controller.events import build_event_of
from topwork.cluster.controller.interruptions import (
    AGAIN_SECONDS,
    CHANGED_ERRORS,
    GONE_ERRORS,
    INTERRUPTIONS,
    UNAVAILABLE_SECONDS,
)
from topwork.cluster.controller.searches.config_map_journal import ConfigMapJournal
from topwork.cluster.controller.searches.coordination import Coordination
from topwork.cluster.controller.searches.observation import SearchObservation, fingerprint_of
from topwork.cluster.controller.searches.search_cache import SEARCH, SearchCache, SearchKey
from topwork.cluster.controller.searches.search_status import build_search_status, describe_search_changes
from topwork.cluster.controller.searches.spec_resolution import resolve
from topwork.cluster.controller.spec_resolution import Rejection
from topwork.cluster.controller.status_writer import write_status
from topwork.cluster.names import CONTROLLER_MANAGER
from topwork.cluster.status.objects import is_being_deleted, name_of, owner_uids
from topwork.cluster.transfer_job_status import ConditionType, State
from topwork.cluster.transfer_search_status import TransferSearchStatus
from topwork.errors import DataError, SettingError, SpecError
from topwork.search.jobs import SEARCH_LABEL
from topwork.search.journal import JournalConflictError
from topwork.search.study import Study

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

log = logging.getLogger(__name__)

CONFLICT_SECONDS = 30.0
"""Delay while a TransferJob of others has the name of a trial."""
Facts = dict[ConditionType, Fact]


class SearchReconciler:
    """Makes the TransferJobs of a TransferSearch match its spec. Thread-safe for different TransferSearches.

    Args:
        cluster: The cluster.
        cache: The watched objects.
        now: Returns the current time, in whole seconds.
    """

    def __init__(self, cluster: "Cluster", cache: SearchCache, now: Callable[[], datetime]) -> None:
        self._cluster, self._cache, self._now = cluster, cache, now
        self._settled: dict[SearchKey, tuple[object, ...]] = {}
        self._lock = threading.Lock()

    def reconcile(self, key: SearchKey) -> float | None:
        """Bring the TransferJobs and the status of a TransferSearch up to date.

        Args:
            key: The TransferSearch.

        Returns:
            Seconds after which it must be reconciled again even without a change; None to wait for a change.

        Raises:
            TopworkError: If a request failed, or the cluster rejects a trial. Try again with back-off.
        """
        cached = self._cache.get(key)
        if cached is None or is_being_deleted(cached.search):  # the garbage collector deletes what it owns
            self._settle(key, None)
            return None
        fingerprint = fingerprint_of(cached)
        if self._settled.get(key) == fingerprint:
            return None
        try:
            delay = _Reconciliation(self._cluster.in_namespace(key.namespace), key, self._now()).run()
        except GONE_ERRORS:
            return UNAVAILABLE_SECONDS
        except (*CHANGED_ERRORS, JournalConflictError):
            log.debug("an object of %s was changed or deleted while it was reconciled", key)
            return AGAIN_SECONDS
        self._settle(key, fingerprint if delay is None else None)
        return delay

    def _settle(self, key: SearchKey, fingerprint: tuple[object, ...] | None) -> None:
        with self._lock:
            if fingerprint is None:
                self._settled.pop(key, None)
            else:
                self._settled[key] = fingerprint


@dataclass(frozen=True)
class _Reconciliation:
    """One reconciliation of one TransferSearch."""

    cluster: "Cluster"
    key: SearchKey
    now: datetime

    def run(self) -> float | None:
        search = self.cluster.get(SEARCH, self.key.name)
        if search is None or is_being_deleted(search):
            return None
        # Before the journal is read: every TransferJob in this list has its event.
        jobs = self.cluster.list("TransferJob", labels=SEARCH_LABEL)
        uid = search["metadata"]["uid"]
        seen = SearchObservation(search, {name_of(obj): obj for obj in jobs if uid in owner_uids(obj)}, self.now)
        target = resolve(self.cluster, seen)
        if isinstance(target, Rejection):
            return self._reject(seen, target)
        try:
            study = Study(target.search, ConfigMapJournal(self.cluster, target.config_map), lambda: self.now)
        except DataError as error:
            return self._reject(seen, Rejection("InvalidJournal", str(error), is_retried=True))
        coordination = Coordination(self.cluster, seen, target, study)
        try:
            status = coordination.advance()
        except SpecError as error:  # of a trial that the template accepted before it was changed
            return self._reject(seen, Rejection("InvalidSpec", str(error), is_retried=False))
        except INTERRUPTIONS:
            raise
        except SettingError as error:  # such as a journal that is too large
            self._store(seen, build_search_status(seen, _unfinished_state(seen), {}, waiting_for=str(error)))
            raise
        self._store(seen, status)
        return CONFLICT_SECONDS if coordination.conflict else None

    def _reject(self, seen: SearchObservation, rejection: Rejection) -> float | None:
        """Report why a TransferSearch is not accepted. Trials of an earlier spec go on, but no further one starts."""
        previous = seen.previous
        facts: Facts = {"Accepted": Fact(rejection.reason, rejection.message, holds=False)}
        if rejection.is_retried or (previous.search and not previous.is_final):
            status = build_search_status(seen, _unfinished_state(seen), facts, waiting_for=rejection.message)
        else:
            facts["Failed"] = Fact(rejection.reason, rejection.message)
            status = build_search_status(seen, "Failed", facts, error=rejection.message)
        self._store(seen, status)
        if rejection.is_retried:
            raise SettingError(f"TransferSearch {self.key.name} in {self.key.namespace}: {rejection.message}")
        return None

    def _store(self, seen: SearchObservation, status: TransferSearchStatus) -> None:
        if status == seen.previous:
            return
        for occasion, report in describe_search_changes(seen.previous, status):
            # Like other controllers, this one works without the permission to create events.
            with suppress(SettingError):
                event = build_event_of(seen.search, (seen.generation, *occasion), report, seen.now)
                self.cluster.apply(event, manager=CONTROLLER_MANAGER, force=True)
        write_status(self.cluster, seen.search, status)


def _unfinished_state(seen: SearchObservation) -> State:
    """Return the state of a search that does not continue for now."""
    return seen.previous.state if not seen.previous.is_final else "Pending"
