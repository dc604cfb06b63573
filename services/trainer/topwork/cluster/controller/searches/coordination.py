"""The next step of a search: records results, starts trials, and publishes the best one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.controller.conditions import Fact
from topwork.cluster.controller.interruptions import INTERRUPTIONS
from topwork.cluster.controller.searches.observation import SearchObservation
from topwork.cluster.controller.searches.search_status import (
    build_search_status,
    describe_study,
    describe_wait,
    is_started,
)
from topwork.cluster.controller.searches.spec_resolution import SearchTarget
from topwork.cluster.controller.searches.trial_jobs import (
    TrialFailure,
    build_trial_job,
    change_spec,
    is_unfinished,
    needs_change,
    read_outcome,
)
from topwork.cluster.manifests.transfer_job import parse_transfer_job
from topwork.cluster.names import BEST_TRIAL
from topwork.cluster.operations.diff import describe_spec_diff
from topwork.cluster.status.objects import get_controller, get_label, is_being_deleted, kubectl_name, name_of
from topwork.cluster.status.transfer_job_run import read_transfer_job_status
from topwork.cluster.transfer_job_status import ConditionType, State, TransferJobStatus
from topwork.cluster.transfer_search_status import TransferSearchStatus
from topwork.errors import DataError, SettingError
from topwork.search.jobs import SEARCH_LABEL, trial_name
from topwork.search.study import Study
from topwork.spec import TransferJob

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster


class Outcome(NamedTuple):
    """How a search ended, or that it is stopped.

    Attributes:
        state: State of the search.
        fact: Condition of that state.
        error: Why it failed.
    """

    state: Literal["Complete", "Failed", "Suspended", "Cancelled"]
    fact: Fact
    error: str | None = None


@dataclass
class Coordination:
    """Advances a search as far as the state of its TransferJobs allows.

    Attributes:
        cluster: The cluster, with the namespace of the search.
        seen: The TransferSearch and its TransferJobs.
        target: Its spec.
        study: Its journal.
        conflict: Why a TransferJob is not as it should be.
    """

    cluster: "Cluster"
    seen: SearchObservation
    target: SearchTarget
    study: Study
    conflict: str | None = field(default=None, init=False)
    _wanted: set[str] = field(default_factory=set, init=False)

    def advance(self) -> TransferSearchStatus:
        """Record results, start or change TransferJobs, and delete those that the search does not need.

        Returns:
            The status of the search.

        Raises:
            JournalConflictError: If another coordinator has continued the search.
            TopworkError: If the cluster rejects a request.
        """
        is_canceled = self.seen.canceled_search == self.target.id
        is_stopped = is_canceled or self.seen.is_suspended
        self._record_outcomes()
        if not is_stopped:
            self._start_trials()
        for run in self.study.running:
            self._ensure(self._build(run.job, str(run.number), suspend=is_stopped))
        outcome = None if self.study.running or not self.study.end_reason else self._publish(suspend=is_stopped)
        self._delete_unneeded()
        return self._status(outcome or self._stop(is_canceled=is_canceled))

    def _record_outcomes(self) -> None:
        for run in self.study.running:
            existing = self.seen.transfer_jobs.get(run.job.metadata.name)
            if existing is None or is_being_deleted(existing) or is_unfinished(existing):
                continue
            if needs_change(existing, self._build(run.job, str(run.number), suspend=False)):
                continue
            outcome = read_outcome(existing, self.study.trials[run.number], self.target.search.spec.metric)
            if isinstance(outcome, TrialFailure):
                cost = {"seconds": outcome.seconds, "gpu_seconds": outcome.gpu_seconds}
                self.study.record_failure(run.number, outcome.error, **cost)
            else:
                self.study.record_result(run.number, outcome)

    def _start_trials(self) -> None:
        parallel = self.target.search.spec.parallel
        while len(self.study.running) < parallel and self.study.start_next() is not None:
            pass

    # ── TransferJobs ────────────────────────────────────────────────────────────────────────────────────────────────

    def _build(self, job: TransferJob, trial: str, *, suspend: bool, selected_run: str = "") -> KubernetesObject:
        datasets = (result.dataset_prefix for trial in self.study.trials for result in trial.results if result.dataset)
        return build_trial_job(
            job, self.seen.search, trial, suspend=suspend, dataset=next(datasets, ""), selected_run=selected_run
        )

    def _ensure(self, desired: KubernetesObject) -> KubernetesObject | None:
        """Create or change a TransferJob; return it if nothing had to be done."""
        name = name_of(desired)
        self._wanted.add(name)
        existing = self.seen.transfer_jobs.get(name) or self.cluster.get("TransferJob", name)
        if existing is None:
            self._write(self.cluster.create, desired, desired)
        elif not self.seen.owns(existing):
            self.conflict = _describe_conflict(existing)
        elif is_being_deleted(existing):
            return None
        elif get_label(existing, SEARCH_LABEL) not in {None, self.target.id}:
            # Of an earlier search, whose dataset it uses. It is created again as soon as it is gone.
            self._delete(existing)
        elif needs_change(existing, desired):
            self._write(self.cluster.replace, change_spec(existing, desired), desired)
        else:
            return existing
        return None

    def _write(
        self, write: Callable[[KubernetesObject], KubernetesObject], obj: KubernetesObject, desired: KubernetesObject
    ) -> None:
        """Write a TransferJob, and note if the cluster rejects it, or an admission webhook changes it."""
        try:
            stored = write(obj)
        except INTERRUPTIONS:
            raise
        except SettingError as error:
            self.conflict = f"{kubectl_name(desired)}: {error}"
            return
        if needs_change(stored, desired):
            diff = describe_spec_diff(parse_transfer_job(desired), parse_transfer_job(stored))
            name = kubectl_name(desired)
            self.conflict = f"{name}: another tool changes its spec, so its result does not count: {diff}"

    def _delete_unneeded(self) -> None:
        """Delete TransferJobs of an earlier spec, and those that run although the journal does not list them."""
        for name, obj in self.seen.transfer_jobs.items():
            if name in self._wanted or is_being_deleted(obj):
                continue
            if get_label(obj, SEARCH_LABEL) != self.target.id or is_unfinished(obj):
                self._delete(obj)

    def _delete(self, obj: KubernetesObject) -> None:
        self.cluster.delete("TransferJob", name_of(obj), uid=obj["metadata"]["uid"])

    # ── The end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _publish(self, *, suspend: bool) -> Outcome | None:
        """Publish the best trial; return how the search ends, or None if it does not yet."""
        try:
            best = self.study.finish()
        except DataError as error:
            return Outcome("Failed", Fact("NoCompleteTrial", str(error)), str(error))
        job, name = self.study.best_job(), trial_name(self.target.search, BEST_TRIAL)
        job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": name})})
        existing = self._ensure(self._build(job, BEST_TRIAL, suspend=suspend, selected_run=best.results[-1].run))
        if existing is None or is_unfinished(existing):
            return None
        status = read_transfer_job_status(existing)
        if status.state != "Complete":
            return _describe_failure(name, status)
        if status.model:
            self.study.record_published(status.model)
        return Outcome("Complete", Fact("Completed", f"published {status.model}" if status.model else ""))

    def _stop(self, *, is_canceled: bool) -> Outcome | None:
        if is_canceled:
            message = f"the annotation topwork.dev/cancel names the search {self.target.id}"
            return Outcome("Cancelled", Fact("CancelledByUser", message))
        return Outcome("Suspended", Fact("SuspendedBySpec", "spec.suspend is true")) if self.seen.is_suspended else None

    def _status(self, outcome: Outcome | None) -> TransferSearchStatus:
        state: State = outcome.state if outcome else "Running" if is_started(self.seen, self.study) else "Pending"
        facts: dict[ConditionType, Fact] = {outcome.state: outcome.fact} if outcome else {}
        values = describe_study(self.study, self.target)
        if outcome and outcome.error:
            values["error"] = outcome.error
        return build_search_status(
            self.seen, state, facts, **values, waiting_for=self.conflict or describe_wait(self.seen)
        )


def _describe_failure(name: str, status: TransferJobStatus) -> Outcome:
    if status.state == "Cancelled":
        error = f"transferjob/{name}, which publishes the best trial, was canceled. To publish it, delete {name}"
        return Outcome("Failed", Fact("PublishingCancelled", error), error)
    condition, error = status.condition("Failed"), f"transferjob/{name}: {status.error}"
    return Outcome("Failed", Fact(condition.reason if condition else "JobFailed", error), error)


def _describe_conflict(obj: KubernetesObject) -> str:
    owner = get_controller(obj)
    belongs = f"belongs to {owner['kind']} {owner['name']}" if owner else "does not belong to this search"
    return f"{kubectl_name(obj)} {belongs}, but has the name of one of its trials. Delete it, or rename the search."
