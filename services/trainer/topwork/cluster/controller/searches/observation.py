"""What the controller sees of a TransferSearch: the object, the TransferJobs that it owns, and its last status."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.controller.searches.search_cache import CachedSearch
from topwork.cluster.names import CANCEL_ANNOTATION
from topwork.cluster.status.objects import get_annotation, name_of, owner_uids
from topwork.cluster.status.transfer_search import read_transfer_search_status
from topwork.cluster.transfer_search_status import TransferSearchStatus

RETRIED_REASONS = {"InvalidDefaults", "NameConflict", "InvalidJournal"}
"""Reasons of the condition Accepted that can end without a change of the spec."""
STATUS_KEYS = ("observedGeneration", "state", "waitingFor")
METADATA_KEYS = ("uid", "generation", "labels", "deletionTimestamp")


@dataclass(frozen=True)
class SearchObservation:
    """A TransferSearch and the TransferJobs that it owns at one time.

    Attributes:
        search: The TransferSearch.
        transfer_jobs: The TransferJobs that it owns, by name.
        now: Current time, in whole seconds.
    """

    search: KubernetesObject
    transfer_jobs: dict[str, KubernetesObject]
    now: datetime

    @cached_property
    def previous(self) -> TransferSearchStatus:
        """The status as last written; an empty one if there is none."""
        return read_transfer_search_status(self.search)

    @property
    def name(self) -> str:
        """Name of the search."""
        return name_of(self.search)

    @property
    def namespace(self) -> str:
        """Namespace of the search."""
        return str(self.search["metadata"]["namespace"])

    @property
    def generation(self) -> int:
        """Generation of the spec."""
        return int(self.search["metadata"]["generation"])

    @property
    def is_suspended(self) -> bool:
        """Whether the spec asks to stop."""
        return (self.search.get("spec") or {}).get("suspend") is True

    @property
    def canceled_search(self) -> str | None:
        """ID of the search to cancel."""
        return get_annotation(self.search, CANCEL_ANNOTATION)

    @property
    def is_accepted(self) -> bool:
        """Whether the last status describes this spec, and accepts it."""
        accepted = self.previous.condition("Accepted")
        is_current = self.previous.observed_generation == self.generation
        return is_current and accepted is not None and accepted.status == "True"

    def owns(self, obj: KubernetesObject) -> bool:
        """Return whether the search is an owner of an object."""
        return self.search["metadata"]["uid"] in owner_uids(obj)


def fingerprint_of(cached: CachedSearch) -> tuple[Any, ...]:
    """Return everything on which the next decision depends: if it is the same, there is nothing to do."""

    def summary(obj: KubernetesObject, status_keys: Sequence[str]) -> tuple[Any, ...]:
        metadata, status = obj["metadata"], obj.get("status") or {}
        values = (*(metadata.get(key) for key in METADATA_KEYS), *(status.get(key) for key in status_keys))
        return tuple(str(value) for value in values)

    jobs = sorted(summary(obj, STATUS_KEYS) for obj in cached.transfer_jobs)
    return (*summary(cached.search, ()), get_annotation(cached.search, CANCEL_ANNOTATION), tuple(jobs))
