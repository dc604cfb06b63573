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
from topwork.registry.cross_validation import (
    CrossValidation,
    cross_validation_key,
    format_images,
    format_mean,
    read_cross_validation,
)
from topwork.registry.evaluated_images import write_evaluated_images
from topwork.registry.kept_weights import KeptWeights
from topwork.registry.stage_keys import stage_keys
from topwork.registry.stage_results import TRAINING_STAGES, Classifier, read_run_result
from topwork.registry.versions import Version
from topwork.report.audit import FINDINGS_FILE, SUSPECTS_FILE
from topwork.report.documents import render_model_card, render_report
from topwork.report.gates import check_gates, require_gates
from topwork.report.results import Results, batch_sizes, history_csv, metrics_json, step_seconds
from topwork.spec import TransferJob
from topwork.spec.yaml_output import dump_job
from topwork.stages.validate import Validated, find_validated
from topwork.training.input_stalls import input_wait_share, is_input_bound
from topwork.workspace import Workspace

if TYPE_CHECKING:
    from topwork.report.export_check import CheckProcess
    from topwork.report.held_out_evaluation import EvaluatedClassifier

log = structlog.get_logger(__name__)

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
        key: Key of evaluation and publishing; see `topwork.registry.stage_keys`.
        name: Name of the model.
        version: Version number.
        uri: URI of the version.
        report_uri: URI of its report.
        metrics: The metrics requested by the job, in the order of the spec, and the loss.
        split: Split on which they were measured.
        images: Number of images in that split.
        excluded_classes: Number of classes without images in that split, which averaged metrics exclude.
        duplicates: Number of images in that split with an exact or near duplicate in train; None if not searched.
        stages: Cost of each training stage, in order.
        weights: Stage and epoch that the weights come from; None in records of older versions of topwork.
        started: Start of the publish stage; None in records of older versions of topwork.
        finished: End of the publish stage.
        deviations: Standard deviation of the metrics between the folds of cross-validation; empty without.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    key: str = ""
    name: str
    version: int
    uri: str
    report_uri: str
    metrics: dict[str, float]
    split: str
    images: int
    excluded_classes: int = 0
    duplicates: int | None = None
    stages: dict[str, StageCost] = {}
    weights: KeptWeights | None = None
    started: datetime | None = None
    finished: datetime | None = None
    deviations: dict[str, float] = {}

    def restore_metrics(self, metrics: Metrics) -> None:
        """Set the Prometheus metrics of the evaluation, so that a resumed run exposes them too."""
        metrics.set_evaluation(self.split, self.metrics)
        metrics.set_failed_gates(0)
        if self.duplicates is not None:
            metrics.set_leaked_images(self.duplicates)
        if self.started and self.finished:
            metrics.restore_stage("publish", self.started, self.finished)

    def summary(self) -> list[str]:
        """Summarize the version and its metrics in a few lines."""
        shown = ", ".join(
            f"{name} {format_mean(value, self.deviations.get(name))}"
            for name, value in list(self.metrics.items())[:SHOWN_METRICS]
        )
        steps = [f"{stage} {cost.step_seconds:.3g} s" for stage, cost in self.stages.items() if cost.step_seconds]
        waits = [
            f"{stage} waited for input {100 * cost.input_wait_share:.0f} % of the time"
            for stage, cost in self.stages.items()
            if cost.input_wait_share
        ]
        return [
            f"Published {self.name} version {self.version}: {shown} on {format_images(self.images, self.split)}",
            f"  model   {self.uri}",
            f"  report  {self.report_uri}",
            *self._caveats(),
            *([f"  step    {', '.join(steps)}"] if steps else []),
            *([f"  input   {', '.join(waits)}"] if waits else []),
            *([f"  note    {self.weights.note}"] if self.weights and self.weights.note else []),
        ]

    def _caveats(self) -> list[str]:
        caveats = []
        if self.excluded_classes:
            caveats.append(
                f"  classes {self.excluded_classes} without images in the {self.split} split, not part of averaged "
                "metrics"
            )
        if self.duplicates:
            caveats.append(
                f"  leaks   {self.duplicates} of {format_images(self.images, self.split)} have a near duplicate in "
                "train: the metrics may be optimistic"
            )
        return caveats


def publish(
    job: TransferJob,
    classifier: Classifier,
    dataset: StoredDataset,
    workspace: Workspace,
    validated: Results | None = None,
) -> Published:
    """Evaluate a trained classifier and publish it as a new version of its model.

    Args:
        job: The job.
        classifier: The result of the last training stage.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch.
        validated: Results of cross-validation, for a classifier that was trained on all images.

    Returns:
        The published version. If these weights were already published with the same metrics and formats, that version.

    Raises:
        GateError: If a gate is not met. Evaluation and report are stored in `runs/<run>/`; nothing is published.
        DataError: If there is no split to evaluate on, or a predicted probability is not finite.
        RuntimeError: If an exported model does not predict like the evaluated model.
    """
    with workspace.metrics.track_stage("publish"):
        if published := find_published(job, dataset, workspace):
            return published
        key = stage_keys(job, dataset.metadata.fingerprint, workspace.storage, dataset.inputs).publish
        if version := versions.find_version_by_key(workspace.storage, job.model_name, key, classifier.file.sha256):
            return _reuse(job, _finish(job, version, workspace), workspace)
        folder = workspace.scratch / "publish"
        shutil.rmtree(folder, ignore_errors=True)  # leftovers of an earlier attempt
        folder.mkdir(parents=True)
        from topwork.report.held_out_evaluation import write_export_check

        with _start_export_check() as check_process:
            evaluated = _evaluate(job, classifier, dataset, workspace, folder, validated)
            results = apply_gates(evaluated.results, workspace)
            write_export_check(evaluated, dataset, workspace, folder / "check_inputs")
            results = _export(results, evaluated, folder, check_process)
        published = _upload(results, key, classifier.file.sha256, workspace, folder / "version")
        shutil.rmtree(folder)
        return published


def find_published(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> Published | None:
    """Find the version that a run has published. Does not import training libraries.

    Args:
        job: The job of the run.
        dataset: The stored dataset.
        workspace: Storage of the job, and metrics, which show the evaluation of the version again.

    Returns:
        The version; None if the run has not published with these metrics and formats, or the version was deleted, in
        which case the model is published as a new version.

    Raises:
        GateError: If the version does not meet the gates of the job, which may have changed since.
    """
    key = stage_keys(job, dataset.metadata.fingerprint, workspace.storage, dataset.inputs).publish
    published = _read_published(job, key, workspace.storage)
    return _reuse(job, published, workspace) if published else None


def find_outcome(
    job: TransferJob, dataset: StoredDataset, workspace: Workspace
) -> Published | Validated | CrossValidation | None:
    """Find what a run results in: its published version, or its metrics if it does not publish.

    Arguments, errors and a result of None are those of `find_published`.
    """
    if job.spec.publishes:
        return find_published(job, dataset, workspace)
    if not job.spec.dataset.folds:
        return find_validated(job, dataset, workspace)
    key = cross_validation_key(job, dataset.metadata.fingerprint, workspace.storage)
    validation = read_cross_validation(workspace.storage, job.run, key)
    if validation:
        log.info("already evaluated", report=validation.report_uri)
        validation.restore_metrics(workspace.metrics)
        require_gates(check_gates(job.spec.evaluate.gates, validation.means, None), validation.report_uri)
    return validation


def _reuse(job: TransferJob, published: Published, workspace: Workspace) -> Published:
    log.info("already published", model=published.uri)
    published.restore_metrics(workspace.metrics)
    version = versions.read_version(workspace.storage, published.name, published.version)
    # A gate relative to the latest version was checked when the version was published.
    only_once = {"at_least_latest_minus": None, "not_worse_than_latest": None}
    gates = [gate.model_copy(update=only_once) for gate in job.spec.evaluate.gates]
    if version:
        require_gates(check_gates(gates, version.metrics, None), published.uri)
    return published


def _read_published(job: TransferJob, key: str, storage: Storage) -> Published | None:
    published = _read_record(job, storage)
    if published is None or published.key != key:
        return None
    return published if versions.read_version(storage, published.name, published.version) else None


def _read_record(job: TransferJob, storage: Storage) -> Published | None:
    key = f"runs/{job.run}/publish/done.json"
    data = storage.read(key)
    if data is None:
        return None
    return read_json_record(
        Published, data, storage.uri_of(key), "the record of a published run", "start over with --restart"
    )


def _start_export_check() -> "CheckProcess":
    from topwork.report import export_check

    return export_check.CheckProcess()


def _evaluate(
    job: TransferJob,
    classifier: Classifier,
    dataset: StoredDataset,
    workspace: Workspace,
    folder: Path,
    validated: Results | None,
) -> "EvaluatedClassifier":
    from topwork.report.held_out_evaluation import describe_final_model, evaluate_classifier

    if validated:
        return describe_final_model(job, classifier, dataset, workspace, folder, validated)
    evaluated = evaluate_classifier(job, classifier, dataset, workspace, folder)
    show_evaluation(evaluated.results, workspace)
    return evaluated


def show_evaluation(results: Results, workspace: Workspace) -> None:
    """Log the metrics, and expose them to Prometheus."""
    evaluation = results.evaluation
    workspace.metrics.set_evaluation(evaluation.split, evaluation.metrics)
    log.info("evaluation", images=evaluation.images, split=evaluation.split, **results.metrics)


def apply_gates(results: Results, workspace: Workspace) -> Results:
    """Check the gates, and store evaluation and report with the run even if a gate is not met.

    Raises:
        GateError: If a gate is not met.
    """
    evaluation = results.evaluation
    gates = check_gates(results.job.spec.evaluate.gates, evaluation.metrics, results.latest, evaluation.undefined)
    workspace.metrics.set_failed_gates(sum(not gate.met for gate in gates))
    results = dataclasses.replace(results, gates=gates)
    require_gates(gates, store_evaluation(results, workspace.storage))
    return results


def store_evaluation(results: Results, storage: Storage) -> str:
    """Store metrics, history and report with the run; return the URI of their prefix."""
    prefix = f"runs/{results.job.run}"
    storage.write(f"{prefix}/metrics.json", metrics_json(results), content_type="application/json")
    storage.write(f"{prefix}/history.csv", history_csv(results.history), content_type="text/csv")
    storage.write(f"{prefix}/report.html", render_report(results).encode(), content_type="text/html; charset=utf-8")
    return storage.uri_of(prefix)


def _export(results: Results, evaluated: "EvaluatedClassifier", folder: Path, check_process: "CheckProcess") -> Results:
    from topwork.model.export import export_model

    formats = results.job.spec.publish.formats
    log.info("export", formats=" ".join(formats))
    version = folder / "version"
    version.mkdir()
    if evaluated.tested:
        write_evaluated_images(evaluated.tested, version)
    preprocessing = evaluated.images.preprocessing
    export_model(evaluated.model, results.evaluation.class_names, formats, preprocessing, version)
    check = check_process.check(version, folder / "check_inputs", formats)
    log.info(
        "export check",
        images=check.images,
        largest_difference=max(check.largest_difference.values()),
        largest_logit_difference=max(check.largest_logit_difference.values()),
        accepted_logit_difference=check.logit_tolerance,
    )
    return dataclasses.replace(results, formats=formats, export_check=check)


def _upload(results: Results, key: str, weights_sha256: str, workspace: Workspace, folder: Path) -> Published:
    """Claim a version number, upload the files, and write manifest, `latest.json` and `done.json`, in this order."""
    storage, job = workspace.storage, results.job
    number = versions.claim_version(storage, job.model_name, job.run)
    prefix = versions.version_prefix(job.model_name, number)
    uri = storage.uri_of(prefix)
    results = dataclasses.replace(results, version=number, lineage={"Model": uri, **results.lineage})
    _write_documents(results, folder)
    for name in (FINDINGS_FILE, SUSPECTS_FILE) if results.audit else ():
        if (data := storage.read(f"runs/{job.run}/{name}")) is not None:
            (folder / name).write_bytes(data)
    version = Version(
        name=job.model_name,
        version=number,
        uri=uri,
        run=job.run,
        key=key,
        weights=weights_sha256,
        published=versions.utc_now(),
        main_metric=results.main_metric,
        metrics=results.evaluation.metrics,
        split=results.evaluation.split,
        images=results.evaluation.images,
        excluded_classes=results.evaluation.excluded_classes,
        dataset=dataset_prefix(results.dataset.name, results.dataset.fingerprint),
        deviations=results.cross_validation.deviations if results.cross_validation else {},
        duplicates=results.duplicates,
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
        key=version.key,
        name=version.name,
        version=version.version,
        uri=version.uri,
        report_uri=f"{version.uri}/report.html",
        metrics={name: version.metrics[name] for name in requested if name in version.metrics},
        split=version.split,
        images=version.images,
        excluded_classes=version.excluded_classes,
        duplicates=version.duplicates,
        stages=_stage_costs(job, workspace.storage),
        weights=_kept_weights(job, workspace.storage),
        started=workspace.metrics.stage_start_time("publish"),
        finished=datetime.now(UTC),
        deviations=version.deviations,
    )
    storage, key, data = workspace.storage, f"runs/{job.run}/publish/done.json", published.model_dump_json().encode()
    if not storage.write(key, data, only_if_absent=True, content_type="application/json"):
        # Another process of the run was faster, or the record refers to other settings or a deleted version.
        if existing := _read_published(job, version.key, storage):
            return existing
        storage.write(key, data, content_type="application/json")
    return published


def _kept_weights(job: TransferJob, storage: Storage) -> KeptWeights | None:
    results = (read_run_result(storage, job.run, stage) for stage in reversed(TRAINING_STAGES))
    return next((result.kept for result in results if result), None)


def _stage_costs(job: TransferJob, storage: Storage) -> dict[str, StageCost]:
    costs: dict[str, StageCost] = {}
    for stage in TRAINING_STAGES:
        if (result := read_run_result(storage, job.run, stage)) is not None:
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
