"""What MLflow shows of a run: parameters, metrics and tags, within the limits of MLflow."""

import json
import re
from typing import Any

from topwork import __version__
from topwork.clients.mlflow import MetricPoint
from topwork.clients.s3.storage import Storage
from topwork.progress import StageProgress
from topwork.redaction import redact
from topwork.registry.versions import Version
from topwork.search.jobs import SEARCH_LABEL, TRIAL_LABEL
from topwork.spec import TransferJob
from topwork.spec.digest import NOT_TRAINED
from topwork.tracking.run_record import Outcome, RunRecord, list_epochs

RUN_TAG, SEARCH_TAG, STORAGE_TAG = "topwork.run", "topwork.search", "topwork.storage"
"""Tags that identify the MLflow run of a run, and that of a search."""

MAX_PARAMETER_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 5000
"""Limits of MLflow 2.8 and later."""
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9]*")


def experiment_of(job: TransferJob) -> str:
    """Return the name of the experiment of a job: by default, that of its model, or of its search."""
    mlflow = job.spec.tracking.mlflow
    # The ID of a search is its name and a digest.
    search = job.metadata.labels.get(SEARCH_LABEL, "").rpartition("-")[0]
    return (mlflow.experiment if mlflow else None) or search or job.model_name


def run_parameters(job: TransferJob) -> dict[str, str]:
    """Return all values of the spec that can affect the trained weights, also defaults, by their path.

    MLflow does not let parameters change, and these cannot: they determine the name of the run.

    Args:
        job: The job.

    Returns:
        Values such as `{"transfer.optimizer.learningRate": "0.001"}`; lists and maps with other keys as JSON.
    """
    without = NOT_TRAINED | {"storage": True}
    content = job.spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=without)
    return {path: _shorten(redact(text), MAX_PARAMETER_CHARACTERS) for path, text in _flatten(content, "").items()}


def _flatten(value: Any, path: str) -> dict[str, str]:
    if isinstance(value, dict) and all(_KEY.fullmatch(key) for key in value):
        prefix = f"{path}." if path else ""
        return {key: text for name, part in value.items() for key, text in _flatten(part, prefix + name).items()}
    return {path: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def run_tags(record: RunRecord, storage: Storage) -> dict[str, str]:
    """Return the tags of a run: what it is, and where its results are stored.

    Args:
        record: The run.
        storage: Its storage.

    Returns:
        Tags by name. `mlflow.note.content` is the description that MLflow shows, in Markdown.
    """
    job, outcome = record.job, record.outcome
    locations = {"run": storage.uri_of(f"runs/{job.run}"), "spec": storage.uri_of(f"runs/{job.run}/spec.yaml")}
    if outcome and outcome.version:
        version = outcome.version
        locations |= {"model": version.uri, "report": f"{version.uri}/report.html"}
    tags = {
        "topwork.job": job.metadata.name,
        "topwork.version": __version__,
        "mlflow.source.name": f"topwork {__version__}",
        "mlflow.source.type": "JOB",
        "mlflow.note.content": "\n".join(f"- {name}: `{uri}`" for name, uri in locations.items()),
        **{f"topwork.{name}": uri for name, uri in locations.items() if name in {"model", "report"}},
    }
    if trial := job.metadata.labels.get(TRIAL_LABEL):
        tags["topwork.trial"] = trial
    if record.parent:
        tags["topwork.fold"] = str(job.spec.dataset.fold)
    return tags | (error_tag(outcome) if outcome else {})


def error_tag(outcome: Outcome) -> dict[str, str]:
    """Return the tag with the error of a run. An empty error replaces that of an earlier attempt."""
    return {"topwork.error": _shorten(outcome.error, MAX_TAG_CHARACTERS)}


def epoch_metrics(progress: StageProgress) -> dict[int, list[MetricPoint]]:
    """Return the metrics of each epoch, such as `transfer/validation_accuracy`.

    Args:
        progress: The epochs of a stage.

    Returns:
        The values of each epoch, by its number.
    """
    return {
        epoch.number: [
            MetricPoint(f"{progress.stage}/{name}", value, epoch.number, round(1000 * epoch.time))
            for name, value in epoch.values.items()
        ]
        for epoch in list_epochs(progress)
    }


def outcome_metrics(outcome: Outcome, time_ms: int) -> list[MetricPoint]:
    """Return the metrics of the evaluation, such as `test/accuracy`."""
    return [MetricPoint(name, value, 0, time_ms) for name, value in outcome.metrics.items()]


def version_tags(version: Version) -> dict[str, str]:
    """Return the tags of the version that MLflow's registry has of a published version."""
    return {"topwork.version": str(version.version), RUN_TAG: version.run}
