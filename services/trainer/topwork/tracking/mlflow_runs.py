"""Sends runs to MLflow. Each topwork run is one MLflow run, however often it is interrupted or sent."""

import time

from topwork.clients.mlflow import PARENT_TAG, MetricPoint, MlflowServer, import_mlflow
from topwork.clients.s3.storage import Storage
from topwork.errors import SettingError
from topwork.progress import StageProgress
from topwork.search.jobs import SEARCH_LABEL
from topwork.spec import TransferJob
from topwork.tracking.mlflow_values import (
    RUN_TAG,
    SEARCH_TAG,
    STORAGE_TAG,
    epoch_metrics,
    error_tag,
    outcome_metrics,
    run_parameters,
    run_tags,
    version_tags,
)
from topwork.tracking.run_record import Outcome, RunRecord


class MlflowRuns:
    """The MLflow runs of a job and its folds. Whatever MLflow has already is not sent again."""

    name = "MLflow"

    def __init__(self, uri: str, experiment: str, storage: Storage) -> None:
        """Initialize the connection, which `send` opens.

        Args:
            uri: URL of the server.
            experiment: Name of the experiment.
            storage: Storage of the runs.
        """
        import_mlflow()
        self._uri, self._experiment, self._storage = uri, experiment, storage
        self._server: MlflowServer | None = None
        self._run_ids: dict[str, str] = {}
        # Loss of each epoch that MLflow has, by run and stage.
        self._logged: dict[tuple[str, str], dict[int, float]] = {}

    def send(self, record: RunRecord) -> None:
        """Send everything about a run that MLflow does not have yet.

        Args:
            record: The run.

        Raises:
            SettingError: If the server rejects the credentials or a request.
            UnavailableError: If the server cannot be reached.
        """
        server = self._connect()
        run_id = self._open_run(server, record)
        try:
            for progress in record.stages.values():
                self._send_epochs(server, record.job.run, run_id, progress)
            if record.outcome:
                self._send_outcome(server, record, record.outcome, run_id)
        except SettingError:
            # The MLflow run may have been deleted: the next record finds or creates another one.
            del self._run_ids[record.job.run]
            self._logged = {key: values for key, values in self._logged.items() if key[0] != record.job.run}
            raise

    def _connect(self) -> MlflowServer:
        self._server = self._server or MlflowServer(self._uri, self._experiment)
        return self._server

    def _identity(self, tag: str, name: str) -> dict[str, str]:
        return {tag: name, STORAGE_TAG: self._storage.uri}

    def _open_run(self, server: MlflowServer, record: RunRecord) -> str:
        job = record.job
        if run_id := self._run_ids.get(job.run):
            return run_id
        run_id = server.open_run(self._identity(RUN_TAG, job.run), job.run)
        logged = server.read_run(run_id).parameters
        missing = {path: text for path, text in run_parameters(job).items() if path not in logged}
        server.log(run_id, parameters=missing, tags=self._tags(server, record))
        if record.is_running:
            server.set_status(run_id, "RUNNING")
        self._run_ids[job.run] = run_id
        return run_id

    def _tags(self, server: MlflowServer, record: RunRecord) -> dict[str, str]:
        """Return the tags of a run, with the MLflow run that it is shown below."""
        tags = run_tags(record, self._storage)
        if record.parent:
            tags[PARENT_TAG] = server.open_run(self._identity(RUN_TAG, record.parent), record.parent)
        elif search := record.job.metadata.labels.get(SEARCH_LABEL):
            tags[PARENT_TAG] = server.open_run(self._identity(SEARCH_TAG, search), search)
        return tags

    def _send_epochs(self, server: MlflowServer, run: str, run_id: str, progress: StageProgress) -> None:
        """Send the epochs that MLflow does not have, and those whose values have changed: the stage was trained again.

        An epoch that was trained after the last checkpoint is trained again after a kill, on a GPU with values that
        differ in the last digits.
        """
        # After a failed request, MLflow may have its values or not: they are read again.
        logged = self._logged.pop((run, progress.stage), None)
        if logged is None:
            logged = server.read_values(run_id, f"{progress.stage}/loss")
        losses = {int(row["epoch"]): float(row["loss"]) for row in progress.rows}
        points: list[MetricPoint] = []
        for epoch, values in epoch_metrics(progress).items():
            if epoch not in logged:
                points += values
            elif logged[epoch] != losses[epoch]:
                # MLflow shows the newest value of a step.
                points += [value._replace(time_ms=_now_ms()) for value in values]
        server.log(run_id, metrics=points)
        self._logged[run, progress.stage] = logged | losses

    def _send_outcome(self, server: MlflowServer, record: RunRecord, outcome: Outcome, run_id: str) -> None:
        tags = self._tags(server, record)
        runs = {run_id: tags}
        if _is_winner(record.job):
            # It is the last run of its search, which ends with it.
            runs[tags[PARENT_TAG]] = run_tags(record, self._storage)
        for ended, its_tags in runs.items():
            known = server.read_run(ended).metrics
            changed = [point for point in outcome_metrics(outcome, _now_ms()) if known.get(point.name) != point.value]
            server.log(ended, metrics=changed, tags=its_tags)
            server.set_status(ended, outcome.status)
        if version := outcome.version:
            server.register(version.name, version.uri, run_id, version_tags(version))


class MlflowSearch(MlflowRuns):
    """The MLflow run of a search that ends without a winner."""

    def send(self, record: RunRecord) -> None:
        """Send the outcome of the search.

        Args:
            record: A job with the labels of the search, and the outcome. Errors are those of `MlflowRuns.send`.
        """
        server, search = self._connect(), record.job.metadata.labels[SEARCH_LABEL]
        run_id = server.open_run(self._identity(SEARCH_TAG, search), search)
        if record.outcome:
            server.log(run_id, tags=error_tag(record.outcome))
            server.set_status(run_id, record.outcome.status)


def _is_winner(job: TransferJob) -> bool:
    """Whether a job publishes the best trial of a search; trials publish nothing."""
    return SEARCH_LABEL in job.metadata.labels and job.spec.publishes


def _now_ms() -> int:
    return round(1000 * time.time())
