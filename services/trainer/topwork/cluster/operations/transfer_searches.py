"""TransferSearches in a cluster whose controller runs them: finding, submitting, following and canceling."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.api_request import KINDS
from topwork.clients.kubernetes.errors import ForbiddenError, UnknownApiError
from topwork.cluster.names import BEST_TRIAL, CANCEL_ANNOTATION
from topwork.cluster.operations.runs import DELETION_TIMEOUT_SECONDS, MIN_PAUSE_SECONDS
from topwork.cluster.operations.transfer_jobs import CANCEL_MANAGER, get_transfer_job, require_custom_resource
from topwork.cluster.status.objects import get_annotation, is_being_deleted, name_of, owner_uids
from topwork.cluster.status.transfer_job_run import CONTROLLER_COMMAND, read_transfer_job_status
from topwork.cluster.status.transfer_search import read_transfer_search_status
from topwork.cluster.transfer_search_status import TransferSearchStatus
from topwork.errors import SettingError, UnavailableError
from topwork.search.jobs import SEARCH_LABEL, TRIAL_LABEL

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

TRANSFER_SEARCH = "TransferSearch"
PREFIXES = ("transfersearch", "transfersearches", "transfersearch.topwork.dev", "transfersearches.topwork.dev", "ts")
"""Kinds that may precede the name of a search, as in kubectl."""
NOT_SERVED = "The cluster does not serve TransferSearches. Install their definition with: topwork crd --apply"
POLL_SECONDS = 2.0
GRACE_SECONDS = 300.0
"""Time for the checkpoints of the trials when a search is canceled or deleted."""
SearchOutcome = Literal["submitted", "replaced", "changed", "resumed", "unchanged", "complete"]


def find_search(cluster: "Cluster", name: str) -> KubernetesObject | None:
    """Find the search that a name refers to.

    Args:
        cluster: The cluster.
        name: Name of a search, alone or after `transfersearch/` or `ts/`. Alone, it may also be that of a TransferJob,
            which then takes precedence.

    Returns:
        The TransferSearch; None if the name refers to none.

    Raises:
        NotFoundError: If there is none, and the name says that it is one.
    """
    prefix, _, plain = name.rpartition("/")
    if prefix:
        return get_search(cluster, plain) if prefix in PREFIXES else None
    try:
        search = cluster.get(TRANSFER_SEARCH, plain)
        return None if search is None or get_transfer_job(cluster, plain) else search
    except (ForbiddenError, UnknownApiError):
        return None


def get_search(cluster: "Cluster", name: str) -> KubernetesObject:
    """Return a TransferSearch.

    Raises:
        NotFoundError: If it does not exist.
        SettingError: If the cluster does not serve TransferSearches, or the account may not read them.
    """
    return require_custom_resource(cluster, TRANSFER_SEARCH, name, NOT_SERVED)


def list_searches(cluster: "Cluster", *, all_namespaces: bool = False) -> list[KubernetesObject]:
    """List TransferSearches, by name; none if the cluster does not serve the kind, or the account may not list it."""
    try:
        return cluster.list(TRANSFER_SEARCH, all_namespaces=all_namespaces)
    except (ForbiddenError, UnknownApiError):
        return []


def find_publisher(cluster: "Cluster", search: KubernetesObject) -> str | None:
    """Return the name of the run that publishes the best trial of a search; None if there is none."""
    uid = search["metadata"]["uid"]
    jobs = cluster.list("TransferJob", labels=f"{SEARCH_LABEL},{TRIAL_LABEL}={BEST_TRIAL}")
    return next((read_transfer_job_status(obj).run for obj in jobs if uid in owner_uids(obj)), None)


class SubmittedSearch(NamedTuple):
    """What the submission of a search did.

    Attributes:
        outcome: `submitted` if it is new; `replaced` if it replaces one in which all trials failed; `changed` if its
            spec, labels or annotations changed; `resumed` if it was canceled, or its best trial could not be published;
            `unchanged` if it is not finished, and `complete` if it is complete, with the same spec.
        ended: When it ended before, if it now continues.
    """

    outcome: SearchOutcome
    ended: datetime | None


@dataclass(frozen=True)
class SearchSubmission:
    """Submits a TransferSearch.

    Attributes:
        cluster: The cluster, with the namespace of the search.
        obj: The TransferSearch to apply, without status.
        report: Callback for progress messages, one line each.
        timeout_seconds: How long the deletion of one that has failed may take.
    """

    cluster: "Cluster"
    obj: KubernetesObject
    report: Callable[[str], None]
    timeout_seconds: float = field(default=GRACE_SECONDS + DELETION_TIMEOUT_SECONDS, kw_only=True)

    def submit(self) -> "SubmittedSearch":
        """Apply the TransferSearch.

        Raises:
            SettingError: If the API server rejects it, or does not serve TransferSearches.
            UnavailableError: If the API server does not respond, or an existing one is not deleted in time.
        """
        existing = self._get_settled()
        outcome = self._plan(existing)
        name, ended = name_of(self.obj), read_transfer_search_status(existing or {}).completion_time
        if outcome == "replaced" and existing is not None:
            self.report(f"transfersearch/{name} has failed and is replaced: its trials reuse what is stored")
            self.cluster.delete(TRANSFER_SEARCH, name, uid=existing["metadata"]["uid"], propagation="Foreground")
            self._wait_until_deleted(existing)
        if outcome not in {"unchanged", "complete"}:
            self.cluster.apply(self.obj)
        if outcome == "resumed" and existing is not None:
            self._delete_failed_publication(existing)
        if existing is not None and get_annotation(existing, CANCEL_ANNOTATION) and outcome != "replaced":
            set_cancellation(self.cluster, name, None)
        return SubmittedSearch(outcome, None if outcome == "complete" else ended)

    def preview(self) -> SearchOutcome:
        """Return what `submit` would do, after the API server has validated the TransferSearch; nothing is stored."""
        existing = self._get()
        return self._plan(None if existing is None or is_being_deleted(existing) else existing)

    def _plan(self, existing: KubernetesObject | None) -> SearchOutcome:
        preview = self._apply_dry()
        if existing is None:
            return "submitted"
        if _content(preview) != _content(existing):
            return "changed"
        status = read_transfer_search_status(existing)
        if status.state == "Failed" and not status.best:
            return "replaced"
        if status.state in {"Failed", "Cancelled"} or get_annotation(existing, CANCEL_ANNOTATION):
            return "resumed"
        return "complete" if status.state == "Complete" else "unchanged"

    def _delete_failed_publication(self, existing: KubernetesObject) -> None:
        """Delete the TransferJob that failed to publish the best trial: the controller creates it again."""
        uid, labels = existing["metadata"]["uid"], f"{SEARCH_LABEL},{TRIAL_LABEL}={BEST_TRIAL}"
        for obj in self.cluster.list("TransferJob", labels=labels):
            if uid in owner_uids(obj) and read_transfer_job_status(obj).state in {"Failed", "Cancelled"}:
                self.cluster.delete("TransferJob", name_of(obj), uid=obj["metadata"]["uid"])

    def _apply_dry(self) -> KubernetesObject:
        try:
            return self.cluster.apply(self.obj, dry_run=True)
        except UnknownApiError:
            raise SettingError(f"{NOT_SERVED}.") from None

    def _get(self) -> KubernetesObject | None:
        try:
            return self.cluster.get(TRANSFER_SEARCH, name_of(self.obj))
        except UnknownApiError:
            raise SettingError(f"{NOT_SERVED}.") from None

    def _get_settled(self) -> KubernetesObject | None:
        existing = self._get()
        if existing is None or not is_being_deleted(existing):
            return existing
        self.report(f"transfersearch/{name_of(existing)} is being deleted: waiting")
        self._wait_until_deleted(existing)
        return self._get()

    def _wait_until_deleted(self, existing: KubernetesObject) -> None:
        name, uid, deadline = name_of(existing), existing["metadata"]["uid"], time.monotonic() + self.timeout_seconds
        while (current := self._get()) is not None and current["metadata"]["uid"] == uid:
            if time.monotonic() > deadline:
                raise UnavailableError(f"transfersearch/{name} has not been deleted in time. Submit it again.")
            time.sleep(MIN_PAUSE_SECONDS)


def _content(obj: KubernetesObject) -> tuple[object, ...]:
    """Return what decides whether two TransferSearches are the same."""
    metadata = obj["metadata"]
    annotations = {key: value for key, value in (metadata.get("annotations") or {}).items() if key != CANCEL_ANNOTATION}
    return obj.get("spec"), metadata.get("labels") or {}, annotations


def follow_search(
    cluster: "Cluster", name: str, ended: datetime | None = None, *, outage_seconds: float = 300.0
) -> Iterator[TransferSearchStatus]:
    """Yield the status of a search whenever it changes; the last one is final.

    Args:
        cluster: The cluster.
        name: Name of the search.
        ended: When the search ended before it was submitted again; the controller may not have noticed it yet.
        outage_seconds: How long the API server may not respond.

    Raises:
        NotFoundError: If the search does not exist, or is deleted.
        UnavailableError: If the API server does not respond for too long.
    """
    previous, outage_start = None, 0.0
    while True:
        try:
            obj = get_search(cluster, name)
        except UnavailableError:
            outage_start = outage_start or time.monotonic()
            if time.monotonic() - outage_start > outage_seconds:
                raise
        else:
            outage_start = 0.0
            status = read_transfer_search_status(obj)
            is_current = status.observed_generation >= int(obj["metadata"].get("generation") or 0)
            is_current &= not (status.is_final and ended is not None and status.completion_time == ended)
            if is_current and status != previous:
                previous = status
                yield status
            if is_current and status.is_final:
                return
        time.sleep(POLL_SECONDS)


def set_cancellation(cluster: "Cluster", name: str, search: str | None) -> None:
    """Ask the controller to cancel a search; returns immediately.

    Args:
        cluster: The cluster.
        name: Name of the TransferSearch.
        search: ID of the search to cancel; None to withdraw an earlier request.
    """
    annotations = {"annotations": {CANCEL_ANNOTATION: search}} if search else {}
    request = {"apiVersion": KINDS[TRANSFER_SEARCH].api_version, "kind": TRANSFER_SEARCH}
    cluster.apply(request | {"metadata": {"name": name} | annotations}, manager=CANCEL_MANAGER, force=True)


def cancel_search(
    cluster: "Cluster", obj: KubernetesObject, report: Callable[[str], None], timeout_seconds: float = GRACE_SECONDS
) -> TransferSearchStatus:
    """Cancel a search, and wait until its trials have written their checkpoints.

    Args:
        cluster: The cluster.
        obj: The TransferSearch.
        report: Callback for progress messages, one line each.
        timeout_seconds: How long that may take.

    Returns:
        Its last status: it can be finished before it is canceled.

    Raises:
        SettingError: If it has not started.
        UnavailableError: If it takes too long.
    """
    name, uid, search = name_of(obj), obj["metadata"]["uid"], read_transfer_search_status(obj).search
    if search is None:
        delete = f"kubectl delete transfersearch {name} -n {cluster.namespace}"
        raise SettingError(f"transfersearch/{name} has not started, so there is nothing to cancel. Delete it: {delete}")
    set_cancellation(cluster, name, search)
    deadline, reported = time.monotonic() + timeout_seconds + DELETION_TIMEOUT_SECONDS, ""
    while True:
        status = read_transfer_search_status(get_search(cluster, name))
        waiting = _describe_wait(cluster, name, uid, status)
        if not waiting:
            return status
        if waiting != reported:
            reported = waiting
            report(waiting)
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"transfersearch/{name} is not canceled in time: {waiting}. See {CONTROLLER_COMMAND}"
            )
        time.sleep(MIN_PAUSE_SECONDS)


def _describe_wait(cluster: "Cluster", name: str, uid: str, status: TransferSearchStatus) -> str:
    if not status.is_final:
        return f"waiting for the controller to cancel transfersearch/{name}"
    for obj in cluster.list("TransferJob", labels=SEARCH_LABEL):
        trial = read_transfer_job_status(obj)
        if uid in owner_uids(obj) and (trial.state in {"Pending", "Running"} or trial.waiting_for):
            return f"waiting for transferjob/{name_of(obj)}: {trial.waiting_for or 'to stop with a checkpoint'}"
    return ""
