"""The publish stage: evaluates the classifier, checks gates, exports it, checks the export, and publishes a version."""

import dataclasses
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from pydantic import BaseModel, ConfigDict

from topwork.artifacts import read_json_record, write_artifact
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import StoredDataset, dataset_prefix
from topwork.errors import DataError
from topwork.registry import versions
from topwork.registry.stage_results import Classifier, TrainingStage, read_stage_result
from topwork.registry.versions import Version
from topwork.report.documents import render_model_card, render_report
from topwork.report.gates import check_gates, require_gates
from topwork.report.results import Results, batch_sizes, history_csv, metrics_json, step_seconds
from topwork.spec import TransferJob
from topwork.spec.yaml_output import dump_job
from topwork.training.input_stalls import input_wait_share, is_input_bound
from topwork.workspace import Workspace

if TYPE_CHECKING:
    from topwork.report.held_out_evaluation import EvaluatedClassifier

log = structlog.get_logger(__name__)

TRAINING_STAGES: tuple[TrainingStage, ...] = ("transfer", "fine-tune")
# Number of metrics in the summary; the report contains all.
SHOWN_METRICS = 4


class StageCost(BaseModel):
    """Cost of a training stage.

    Attributes:
        trainable: Trainable parameters at the end of the stage.
        batch_size: Global batch size.
        step_seconds: Duration of a typical step in seconds; None if no epoch was measured.
        input_wait_share: Share of the training time spent waiting for input; None if the stage was not input-bound.
    """

    model_config = ConfigDict(frozen=True)

    trainable: int
    batch_size: int
    step_seconds: float | None
    input_wait_share: float | None = None


class Published(BaseModel):
    """A version published by a run, stored as `runs/<run>/publish/done.json`.

    Attributes:
        format: Format version of this record.
        name: Name of the model.
        version: Version number.
        uri: URI of the version.
        report_uri: URI of its report.
        metrics: The metrics requested by the job, in the order of the spec, and the loss.
        split: Split on which they were measured.
        images: Number of images in that split.
        stages: Cost of each training stage, in order.
        started: Start of the publish stage; None in records of older versions of topwork.
        finished: End of the publish stage.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    name: str
    version: int
    uri: str
    report_uri: str
    metrics: dict[str, float]
    split: str
    images: int
    stages: dict[str, StageCost] = {}
    started: datetime | None = None
    finished: datetime | None = None

    def restore_metrics(self, metrics: Metrics) -> None:
        """Set the Prometheus metrics of the evaluation, so that a resumed run exposes them too."""
        metrics.set_evaluation(self.split, self.metrics)
        metrics.set_failed_gates(0)
        if self.started and self.finished:
            metrics.restore_stage("publish", self.started, self.finished)

    def summary(self) -> list[str]:
        """Summarize the version and its metrics in a few lines."""
        shown = ", ".join(f"{name} {value:.4f}" for name, value in list(self.metrics.items())[:SHOWN_METRICS])
        steps = [f"{stage} {cost.step_seconds:.3g} s" for stage, cost in self.stages.items() if cost.step_seconds]
        waits = [
            f"{stage} waited for input {100 * cost.input_wait_share:.0f} % of the time"
            for stage, cost in self.stages.items()
            if cost.input_wait_share
        ]
        return [
            f"Published {self.name} version {self.version}: {shown} on {self.images} images of the {self.split} split",
            f"  model   {self.uri}",
            f"  report  {self.report_uri}",
            *([f"  step    {', '.join(steps)}"] if steps else []),
            *([f"  input   {', '.join(waits)}"] if waits else []),
        ]


def publish(job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace) -> Published:
    """Evaluate a trained classifier and publish it as a new version of its model.

    Args:
        job: The job.
        classifier: The result of the last training stage.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The published version. A run that has already published returns its earlier version.

    Raises:
        GateError: If a gate is not met. Evaluation and report are stored in `runs/<run>/`; nothing is published.
        DataError: If there is no split to evaluate on, or a predicted probability is not finite.
        RuntimeError: If an exported model does not predict like the evaluated model.
    """
    with workspace.metrics.track_stage("publish"):
        published = _find_published(job, classifier, workspace)
        if published:
            log.info("already published", model=published.uri)
            published.restore_metrics(workspace.metrics)
            return published
        folder = workspace.scratch / "publish"
        shutil.rmtree(folder, ignore_errors=True)  # leftovers of an earlier attempt
        folder.mkdir(parents=True)
        evaluated = _evaluate(job, classifier, dataset, workspace, folder)
        results = _apply_gates(evaluated.results, workspace)
        results = _export(results, evaluated, folder)
        published = _upload(results, classifier.file.sha256, workspace, folder / "version")
        shutil.rmtree(folder)
        return published


def read_published(job: TransferJob, storage: Storage) -> Published | None:
    """Find the version that a run has published. Does not import training libraries.

    Args:
        job: The job of the run.
        storage: Storage of the job.

    Returns:
        The version; None if there is none or it was deleted, in which case the model is published as a new version.
    """
    data = storage.read(f"runs/{job.run}/publish/done.json")
    if data is None:
        return None
    uri = storage.uri_of(f"runs/{job.run}/publish/done.json")
    published = read_json_record(Published, data, uri, "the record of a published run", "start over with --restart")
    return published if versions.read_version(storage, published.name, published.version) else None


def _find_published(job: TransferJob, classifier: Classifier, workspace: Workspace) -> Published | None:
    if published := read_published(job, workspace.storage):
        return published
    version = versions.find_version_of_run(workspace.storage, job.model_name, job.run, classifier.file.sha256)
    return _finish(job, version, workspace) if version else None


def _evaluate(
    job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace, folder: Path
) -> "EvaluatedClassifier":
    from topwork.report.held_out_evaluation import evaluate_classifier

    evaluated = evaluate_classifier(job, classifier, dataset, workspace, folder)
    evaluation = evaluated.results.evaluation
    workspace.metrics.set_evaluation(evaluation.split, evaluation.metrics)
    log.info("evaluation", images=evaluation.images, split=evaluation.split, **evaluated.results.metrics)
    return evaluated


def _apply_gates(results: Results, workspace: Workspace) -> Results:
    """Check the gates, and store evaluation and report with the run even if a gate is not met."""
    latest = versions.read_latest(workspace.storage, results.job.model_name)
    gates = check_gates(
        results.job.spec.evaluate.gates,
        results.evaluation.metrics,
        latest.metrics if latest else None,
        f"{latest.name}/{latest.version}" if latest else "",
    )
    workspace.metrics.set_failed_gates(sum(not gate.met for gate in gates))
    results = dataclasses.replace(results, gates=gates)
    storage, prefix = workspace.storage, f"runs/{results.job.run}"
    storage.write(f"{prefix}/metrics.json", metrics_json(results), content_type="application/json")
    storage.write(f"{prefix}/history.csv", history_csv(results.history), content_type="text/csv")
    storage.write(f"{prefix}/report.html", render_report(results).encode(), content_type="text/html; charset=utf-8")
    require_gates(gates, storage.uri_of(prefix))
    return results


def _export(results: Results, evaluated: "EvaluatedClassifier", folder: Path) -> Results:
    from topwork.data.decoding import resize
    from topwork.model.export import export_model
    from topwork.report.export_check import check_export

    formats = results.job.spec.publish.formats
    log.info("export", formats=" ".join(formats))
    version = folder / "version"
    version.mkdir()
    export_model(evaluated.model, results.evaluation.class_names, formats, resize, version)
    check = check_export(version, evaluated.check_inputs, formats)
    log.info(
        "export check",
        images=check.images,
        largest_difference=max(check.largest_difference.values()),
        accepted=check.tolerance,
    )
    return dataclasses.replace(results, formats=formats, export_check=check)


def _upload(results: Results, weights_sha256: str, workspace: Workspace, folder: Path) -> Published:
    """Claim a version number, upload the files, and write manifest, `latest.json` and `done.json`, in this order."""
    storage, job = workspace.storage, results.job
    number = versions.claim_version(storage, job.model_name, job.run)
    prefix = versions.version_prefix(job.model_name, number)
    uri = storage.uri_of(prefix)
    results = dataclasses.replace(results, version=number, lineage={"Model": uri, **results.lineage})
    _write_documents(results, folder)
    version = Version(
        name=job.model_name,
        version=number,
        uri=uri,
        run=job.run,
        weights=weights_sha256,
        published=versions.utc_now(),
        main_metric=results.main_metric,
        metrics=results.evaluation.metrics,
        split=results.evaluation.split,
        images=results.evaluation.images,
        dataset=dataset_prefix(results.dataset.name, results.dataset.fingerprint),
    )
    manifest = write_artifact(storage, prefix, folder, version.model_dump(mode="json"))
    if manifest.facts != version.model_dump(mode="json"):
        raise DataError(
            f"{uri} was published by another process of {job.run} at the same time. Make sure that only one process at "
            "a time works on a run, then start the job again."
        )
    return _finish(job, version, workspace)


def _finish(job: TransferJob, version: Version, workspace: Workspace) -> Published:
    """Update `latest.json` and write `done.json` of the run; the version is already complete."""
    versions.update_latest(workspace.storage, version.name)
    requested: list[str] = [*job.spec.evaluate.metrics, "loss"]
    published = Published(
        name=version.name,
        version=version.version,
        uri=version.uri,
        report_uri=f"{version.uri}/report.html",
        metrics={name: version.metrics[name] for name in requested if name in version.metrics},
        split=version.split,
        images=version.images,
        stages=_stage_costs(job, workspace.storage),
        started=workspace.metrics.stage_start_time("publish"),
        finished=datetime.now(UTC),
    )
    storage, key, data = workspace.storage, f"runs/{job.run}/publish/done.json", published.model_dump_json().encode()
    if not storage.write(key, data, only_if_absent=True, content_type="application/json"):
        # Another process of the run was faster, or the record refers to a deleted version.
        if existing := read_published(job, storage):
            return existing
        storage.write(key, data, content_type="application/json")
    return published


def _stage_costs(job: TransferJob, storage: Storage) -> dict[str, StageCost]:
    costs: dict[str, StageCost] = {}
    for stage in TRAINING_STAGES:
        if (result := read_stage_result(storage, job.run, stage)) is not None:
            costs[stage] = StageCost(
                trainable=result.parameters.trainable,
                batch_size=batch_sizes(job)[stage],
                step_seconds=step_seconds(job, result.rows).get(stage),
                input_wait_share=input_wait_share(result.rows) if any(map(is_input_bound, result.rows)) else None,
            )
    return costs


def _write_documents(results: Results, folder: Path) -> None:
    # One line per class: class names may contain line breaks.
    labels = [" ".join(name.splitlines()) for name in results.evaluation.class_names]
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
    (folder / "metrics.json").write_bytes(metrics_json(results))
    (folder / "history.csv").write_bytes(history_csv(results.history))
    (folder / "spec.yaml").write_text(dump_job(results.job), "utf-8")
    (folder / "card.md").write_text(render_model_card(results), "utf-8")
    (folder / "report.html").write_text(render_report(results), "utf-8")
