"""Runs a TransferSearch on this machine: its trials one after the other, then the best one is published.

`topwork search` calls `run`. In a cluster, the controller decides with the same `Study`, and each trial is a Job.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import structlog
from pydantic import BaseModel, ConfigDict

from topwork import __version__, pipeline
from topwork.artifacts import read_json_record
from topwork.disk_space import disk_full_error, report_full_disk
from topwork.errors import DataError, GateError, Stopped, TopworkError, UnavailableError, quote_error
from topwork.registry.datasets import read_stored_dataset, select_dataset
from topwork.registry.searches import store_search
from topwork.registry.selected_run import require_same_training
from topwork.registry.shared_features import delete_shared_features
from topwork.registry.stage_keys import name_run
from topwork.report.search_report import store_report
from topwork.search.coordinator_lease import CoordinatorLease, hold_lease
from topwork.search.search_id import search_id
from topwork.search.storage_journal import StorageJournal, search_prefix
from topwork.search.study import Study
from topwork.search.trials import Trial, TrialResult, TrialRun
from topwork.spec import TransferJob
from topwork.spec.search import TransferSearch
from topwork.tracking.run_tracking import track_run, track_search
from topwork.workspace import Workspace

if TYPE_CHECKING:
    from topwork.stages.publish import Published
    from topwork.stages.validate import Validated

log = structlog.get_logger(__name__)

NO_TEST_SPLIT = "there is no test split: the metrics are optimistic, as the same images selected the model"


class SearchDataset(BaseModel):
    """The dataset of all trials of a search, stored as `searches/<search id>/dataset.json`.

    Attributes:
        format: Format version of this record.
        prefix: Key prefix of the dataset.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    prefix: str


@dataclass(frozen=True)
class Coordination:
    """What a process needs to coordinate a search, besides the workspace.

    Attributes:
        holder: Identifies this process and those before it on the same state directory; see `hold_lease`.
        observe: Called after each change of the search.
        explain: Converts an exception of a trial to the error that is reported to the user; None for a bug.
    """

    holder: str
    observe: Callable[[Study], None]
    explain: Callable[[BaseException], TopworkError | None]


@dataclass(frozen=True)
class SearchOutcome:
    """What a search results in.

    Attributes:
        published: The published version of the best trial.
        best: The best trial.
        trials: Number of trials.
        metric: Metric of the search.
        report_uri: URI of the report of the search.
    """

    published: "Published"
    best: Trial
    trials: int
    metric: str
    report_uri: str

    def summary(self) -> list[str]:
        """Summarize the search and the published version in a few lines."""
        value = f"{self.metric} {self.best.value:.4f} on the validation split, which selected it"
        return [
            f"Trial {self.best.number} is the best of {self.trials}: {value}",
            f"  report  {self.report_uri}",
            *self.published.summary(),
            *([] if self.published.split == "test" else [f"  note    {NO_TEST_SPLIT}"]),
        ]


def run(search: TransferSearch, workspace: Workspace, coordination: Coordination) -> SearchOutcome:
    """Run all trials of a search, and publish the best one through the gates of its template.

    It is always safe to call this again after the process was killed or stopped: the same trials follow, and an
    interrupted one resumes.

    Args:
        search: The search.
        workspace: Storage, metrics, progress and scratch directory, which the trials use one after the other.
        coordination: The coordinator.

    Returns:
        The best trial and its published version.

    Raises:
        GateError: If the best trial does not meet the gates.
        DataError: If no trial is complete, or the dataset of the search was deleted.
        SettingError: If another process is running the search.
        UnavailableError: If storage, the network or a GPU is unavailable. No trial fails because of that.
        Stopped: If a stop was requested; the checkpoint is stored.
    """
    name = search_id(search)
    with report_full_disk(workspace.scratch), hold_lease(workspace.storage, name, coordination.holder) as lease:
        store_search(search, workspace.storage)
        study = Study(search, StorageJournal(workspace.storage, name))
        with track_search(search, workspace.storage):
            return _LocalSearch(search, study, workspace, coordination, lease).run()


@dataclass(frozen=True)
class _LocalSearch:
    """A search that this process coordinates."""

    search: TransferSearch
    study: Study
    workspace: Workspace
    coordination: Coordination
    lease: CoordinatorLease

    def run(self) -> SearchOutcome:
        self._warn()
        self._observe()
        while run := self._next_run():
            self._carry_out(run)
        try:
            best = self.study.finish()
            delete_shared_features(self.workspace.storage, search_id(self.search))
            log.info("search finished", reason=self.study.end_reason, best=best.number, value=best.value, **best.params)
            published = self._publish(best)
        except GateError as error:
            raise GateError(f"{error} Report of the search: {self._store_report()}") from error
        except DataError:
            self._store_report()
            raise
        self._observe()
        return SearchOutcome(
            published, best, len(self.study.trials), self.search.spec.metric, report_uri=self._store_report()
        )

    def _warn(self) -> None:
        spec = self.search.spec
        if spec.budget.gpu_hours is not None and not _count_gpus(self.workspace):
            log.warning("budget.gpuHours does not limit this search: no GPU is used", hint="set budget.hours")
        if spec.parallel > 1:
            log.info("trials run one after the other on this machine", parallel=spec.parallel)

    def _store_report(self) -> str:
        return store_report(self.search, self.study, self.workspace.storage)

    def _observe(self) -> None:
        best, states = self.study.best, Counter[str](trial.state for trial in self.study.trials)
        self.workspace.metrics.set_search(
            self.search.metadata.name, states, self.search.spec.metric, best.value if best else None
        )
        self.coordination.observe(self.study)

    def _next_run(self) -> TrialRun | None:
        """Return the run that a killed process started, or else the next one."""
        self.lease.check()
        return next(iter(self.study.running), None) or self.study.start_next()

    def _carry_out(self, run: TrialRun) -> None:
        """Run a trial and record its result, or its failure if another attempt would fail, too."""
        self._observe()
        job, workspace = self._select_dataset(run.job)
        started, metric, error, metrics, dataset = time.monotonic(), self.search.spec.metric, "", {}, ""
        try:
            validated = cast("Validated", self._run_pipeline(job, workspace))
            metrics, dataset = validated.metrics, validated.dataset
            error = validated.undefined.get(metric, "")
        except Exception as exception:
            error = self._explain_failure(run, exception)
        seconds = time.monotonic() - started
        cost = {"seconds": seconds, "gpu_seconds": seconds * _count_gpus(workspace)}
        self.lease.check()
        if metric in metrics:
            result = TrialResult(run.epochs, job.run, metrics[metric], metrics, dataset=dataset, **cost)
            trial = self.study.record_result(run.number, result)
        else:
            trial = self.study.record_failure(run.number, error or f"{metric} was not reported.", **cost)
        self._log(trial, seconds)
        self._observe()

    def _explain_failure(self, run: TrialRun, error: Exception) -> str:
        """Return why a trial failed. An error that is not the fault of the trial is raised again."""
        known = self.coordination.explain(error)
        is_disk_full = disk_full_error(error.__cause__ or error) is not None
        if isinstance(known, Stopped | UnavailableError) or is_disk_full or self.workspace.stop.is_set():
            raise error
        if known is None:
            log.error("unexpected error in a trial", number=run.number, exc_info=error)
        return str(known) if known else f"{type(error).__name__}: {quote_error(error)}"

    def _log(self, trial: Trial, seconds: float) -> None:
        facts = {"number": trial.number, "of": self.search.spec.trials, "state": trial.state, "epochs": trial.epochs}
        if trial.error:
            log.warning("trial", **facts, seconds=seconds, **trial.params, error=trial.error)
        else:
            log.info("trial", **facts, **{self.search.spec.metric: trial.value}, seconds=seconds, **trial.params)

    def _publish(self, best: Trial) -> "Published":
        job, workspace = self._select_dataset(self.study.best_job())
        if dataset := read_stored_dataset(workspace.storage, workspace.dataset):
            require_same_training(job, best.results[-1].run, dataset, workspace.storage)
        published = cast("Published", self._run_pipeline(job, workspace))
        self.study.record_published(published.uri)
        return published

    def _run_pipeline(self, job: TransferJob, workspace: Workspace) -> object:
        workspace.metrics.start_job(job=job.metadata.name, run=job.run, stage="run", version=__version__)
        with track_run(job, workspace) as tracked:
            return pipeline.run(job, tracked)

    def _select_dataset(self, job: TransferJob) -> tuple[TransferJob, Workspace]:
        """Return a job, named by what its weights depend on, and a workspace with the dataset of the search.

        All trials use the dataset of the first one, even if images are added meanwhile: metrics on different images
        can't be compared.
        """
        storage, key = self.workspace.storage, f"{search_prefix(search_id(self.search))}/dataset.json"
        if record := storage.read(key):
            prefix = read_json_record(SearchDataset, record, storage.uri_of(key), "the dataset of a search").prefix
            stored = read_stored_dataset(storage, prefix)
            if stored is None:
                raise DataError(
                    f"{storage.uri_of(prefix)}, the dataset of the search, was deleted. Trials on other images can't "
                    "be compared with the trials so far: change metadata.name to start a new search."
                )
            return self._name_run(job, stored.metadata.fingerprint), replace(self.workspace, dataset=prefix)
        selected = select_dataset(job, self.workspace)
        fingerprint = selected.fingerprint if selected else None
        prefix = pipeline.run_pull(self._name_run(job, fingerprint), self.workspace).prefix
        content = SearchDataset(prefix=prefix).model_dump_json().encode()
        storage.write(key, content, only_if_absent=True, content_type="application/json")
        return self._select_dataset(job)

    def _name_run(self, job: TransferJob, fingerprint: str | None) -> TransferJob:
        """Name a run as `topwork run` does."""
        if fingerprint is None or job.spec.dataset.source.tfds:
            return job
        return name_run(job, fingerprint, self.workspace.storage)


def _count_gpus(workspace: Workspace) -> int:
    import tensorflow as tf

    return 0 if workspace.replicas is not None else len(tf.config.list_physical_devices("GPU"))
