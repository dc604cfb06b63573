"""MLflow: the only module that imports it. Credentials come from the environment variables that MLflow reads."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from itertools import groupby
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from topwork.clients.url_policy import check_plain_http, is_forbidden_host
from topwork.errors import SettingError, UnavailableError, quote_error
from topwork.redaction import redact

CREDENTIAL_VARIABLES = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
"""Environment variables with credentials, and keys of the Secret of `spec.tracking.mlflow.secretName`."""
MAX_METRICS_PER_REQUEST = 1000
MAX_PARAMETERS_PER_REQUEST = 100
PARENT_TAG = "mlflow.parentRunId"
"""Tag with the ID of the run that a run is shown below."""
_ERROR_RESPONSES = re.compile(r"too many (\d{3}) error responses")
_is_requesting = ContextVar("is_requesting", default=False)


class MetricPoint(NamedTuple):
    """A value of a metric.

    Attributes:
        name: Name of the metric.
        value: Its value.
        step: Number of the epoch; 0 for the evaluation.
        time_ms: Milliseconds since 1970.
    """

    name: str
    value: float
    step: int
    time_ms: int


class RunValues(NamedTuple):
    """What a run has.

    Attributes:
        parameters: Its parameters.
        metrics: The newest value of each metric.
    """

    parameters: dict[str, str]
    metrics: dict[str, float]


def require_mlflow() -> None:
    """Check that the MLflow client is installed, without importing it.

    Raises:
        SettingError: If it is not.
    """
    if find_spec("mlflow") is None:
        raise SettingError(
            "spec.tracking.mlflow requires mlflow-skinny, which is not installed. Install topwork[tracking], or remove "
            "spec.tracking.mlflow."
        )


def import_mlflow() -> None:
    """Import the client, if it is installed. Call this before another thread uses it.

    TFDS replaces `__import__` in all threads while it is imported, and does not support the imports of MLflow.
    """
    if find_spec("mlflow") is not None:
        import mlflow  # noqa: F401


class MlflowServer:
    """An experiment on an MLflow server. Its runs are found by their tags, so that no process has to know their IDs."""

    def __init__(self, uri: str, experiment: str) -> None:
        """Connect to a server, and create the experiment if it does not exist.

        Args:
            uri: URL of the server.
            experiment: Name of the experiment.

        Raises:
            SettingError: If the URL is not permitted, or the server rejects the credentials or the experiment.
            UnavailableError: If the server cannot be reached.
        """
        self._uri = uri
        if is_forbidden_host(urlsplit(uri).hostname or ""):
            raise SettingError(f"The MLflow server {uri} is a link-local address or a cloud metadata service.")
        check_plain_http(uri, f"The MLflow server {uri}")
        require_mlflow()
        from mlflow import MlflowClient

        _silence_libraries()
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        with self._translate_errors():
            self._experiment = self._open_experiment(experiment)

    def _open_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if (experiment := self._client.get_experiment_by_name(name)) is not None:
            return str(experiment.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:
            # Another process has created it in the meantime, or it cannot be created.
            if (experiment := self._client.get_experiment_by_name(name)) is None:
                raise
            return str(experiment.experiment_id)

    def open_run(self, identity: Mapping[str, str], name: str) -> str:
        """Find the run with certain tags, or create it. If there are several, the oldest one remains.

        Args:
            identity: Tags that identify the run.
            name: Name of a new run.

        Returns:
            ID of the run.

        Raises:
            SettingError: If the server rejects the request.
            UnavailableError: If the server cannot be reached.
        """
        with self._translate_errors():
            if not self._find_runs(identity):
                self._client.create_run(self._experiment, tags=dict(identity), run_name=name)
            if not (runs := self._find_runs(identity)):
                raise UnavailableError(f"The MLflow server {self._uri} failed: it does not find a run that it created.")
            oldest, *others = runs
            # Processes that start at the same time may each create the run, such as the first trials of a search.
            for other in others:
                if not other.data.metrics:
                    self._client.delete_run(other.info.run_id)
            return str(oldest.info.run_id)

    def _find_runs(self, identity: Mapping[str, str]) -> Sequence[Any]:
        conditions = " and ".join(f"tags.`{tag}` = {_quote(value)}" for tag, value in identity.items())
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        runs: Sequence[Any] = self._client.search_runs([self._experiment], conditions, max_results=10, order_by=order)
        return runs

    def read_values(self, run_id: str, metric: str) -> dict[int, float]:
        """Read the values of a metric.

        Args:
            run_id: ID of the run.
            metric: Name of the metric.

        Returns:
            The newest value of each step.

        Raises:
            SettingError: If the server rejects the request.
            UnavailableError: If the server cannot be reached.
        """
        with self._translate_errors():
            points = self._client.get_metric_history(run_id, metric)
        return {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}

    def read_run(self, run_id: str) -> RunValues:
        """Read the parameters and the newest metrics of a run. Errors are those of `read_values`."""
        with self._translate_errors():
            data = self._client.get_run(run_id).data
        return RunValues(dict(data.params), dict(data.metrics))

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[MetricPoint] = (),
        parameters: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Add values to a run, in as few requests as MLflow permits. Each request takes effect as a whole.

        Args:
            run_id: ID of the run.
            metrics: Values of metrics, in the order of their steps. One request has all values of a step.
            parameters: Parameters, which the run does not have yet.
            tags: Tags, which replace those of the same name; at most 100.

        Raises:
            SettingError: If the server rejects the request.
            UnavailableError: If the server cannot be reached.
        """
        from mlflow.entities import Metric, Param, RunTag

        items = list((parameters or {}).items())
        with self._translate_errors():
            if tags:
                self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
            for start in range(0, len(items), MAX_PARAMETERS_PER_REQUEST):
                params = [Param(name, value) for name, value in items[start : start + MAX_PARAMETERS_PER_REQUEST]]
                self._client.log_batch(run_id, params=params)
            for points in _batches_of_whole_steps(metrics):
                batch = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
                self._client.log_batch(run_id, metrics=batch)

    def set_status(self, run_id: str, status: str) -> None:
        """Set the status of a run.

        Args:
            run_id: ID of the run.
            status: RUNNING, or how it ended: FINISHED, FAILED or KILLED, which also sets its end time to now.

        Raises:
            SettingError: If the server rejects the request.
            UnavailableError: If the server cannot be reached.
        """
        with self._translate_errors():
            if status == "RUNNING":
                self._client.update_run(run_id, status=status)
            else:
                self._client.set_terminated(run_id, status)

    def register(self, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> None:
        """Register a model version that refers to a URI, unless that is done.

        Args:
            name: Name of the model.
            source: URI of the version.
            run_id: ID of the run that published it.
            tags: Tags of a new version.

        Raises:
            SettingError: If the server rejects the request.
            UnavailableError: If the server cannot be reached.
        """
        from mlflow.exceptions import MlflowException

        with self._translate_errors():
            try:
                self._client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._client.create_registered_model(name)
            if not any(version.source == source for version in self._list_versions(run_id)):
                self._client.create_model_version(name, source, run_id, tags=dict(tags), await_creation_for=0)

    def _list_versions(self, run_id: str) -> Sequence[Any]:
        versions: Sequence[Any] = self._client.search_model_versions(f"run_id='{run_id}'")
        return versions

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]
        from mlflow.exceptions import MlflowException

        token = _is_requesting.set(True)
        try:
            yield
        except MlflowException as error:
            status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
            reason = redact(quote_error(error))
            if status in {401, 403}:
                raise SettingError(
                    f"The MLflow server {self._uri} rejected the credentials (HTTP {status}). Set "
                    "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; in a cluster, "
                    "in the Secret that spec.tracking.mlflow.secretName names."
                ) from None
            if status in {400, 404}:
                raise SettingError(f"The MLflow server {self._uri} rejected a request: {reason}") from None
            # The client reports a failed connection as an internal error with the whole exception as its text.
            if responses := _ERROR_RESPONSES.search(str(error)):
                reason = f"it answers with HTTP {responses[1]}."
            elif isinstance(error.__context__, OSError):
                reason = "it cannot be reached, or does not answer in time."
            raise UnavailableError(f"The MLflow server {self._uri} failed: {reason}") from None
        except (ValueError, ParseError) as error:
            reason = redact(quote_error(error))
            raise UnavailableError(f"The MLflow server {self._uri} sent an invalid response: {reason}") from None
        finally:
            _is_requesting.reset(token)


def _silence_libraries() -> None:
    """Suppress the warnings of each attempt to reach the server: `_translate_errors` reports the outage once."""
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    # A filter, because other clients use urllib3, too. The same filter is added only once.
    logging.getLogger("urllib3.connectionpool").addFilter(_is_of_another_client)


def _is_of_another_client(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or not _is_requesting.get()


def _batches_of_whole_steps(metrics: Sequence[MetricPoint]) -> Iterator[list[MetricPoint]]:
    batch: list[MetricPoint] = []
    for _, points in groupby(metrics, key=lambda point: point.step):
        values = list(points)
        if batch and len(batch) + len(values) > MAX_METRICS_PER_REQUEST:
            yield batch
            batch = []
        batch += values
    if batch:
        yield batch


def _quote(value: str) -> str:
    """Quote a value of a filter, which has no escape sequences. URIs have no double quotes."""
    return f'"{value}"' if "'" in value else f"'{value}'"
