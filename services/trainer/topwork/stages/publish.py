"""The publish stage: evaluate, hold the gates, export, prove the export, and only then make a version visible."""

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
from topwork.report.documents import card_md, report_html
from topwork.report.gates import gate_outcomes, require_gates
from topwork.report.results import Outcome, batch_sizes, history_csv, metrics_json, step_seconds
from topwork.spec import TransferJob
from topwork.spec.yaml_output import dump_job
from topwork.training.input_stalls import input_wait_share, is_input_bound
from topwork.workspace import Workspace

if TYPE_CHECKING:
    from topwork.report.held_out import Assessed

log = structlog.get_logger(__name__)

# Those that train, in their order.
STAGES: tuple[TrainingStage, ...] = ("transfer", "fine-tune")
# Figures of a last line: the rest is in the report.
SHOWN_METRICS = 4


class Effort(BaseModel):
    """What a training stage took.

    Attributes:
        trainable: Parameters that were trained at its end.
        batch_size: Images of a step over all replicas.
        step_seconds: Seconds of a typical step; None where no epoch was measured.
        input_wait_share: Share of its steps in which it stood still for want of input; None where that is no matter.
    """

    model_config = ConfigDict(frozen=True)

    trainable: int
    batch_size: int
    step_seconds: float | None
    input_wait_share: float | None = None


class Published(BaseModel):
    """A published version.

    Attributes:
        name: Name of the model.
        version: Its number.
        uri: Where it lies.
        report_uri: Where its report lies.
        metrics: The metrics that the job asked for, in its order, and the loss.
        split: The split that they were measured on.
        images: Images of that split.
        started: When its publishing was started; None in what an older topwork has left.
        finished: When it was done.
        stages: What each of its training stages took, in their order.
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
    stages: dict[str, Effort] = {}
    started: datetime | None = None
    finished: datetime | None = None

    def repeat(self, metrics: Metrics) -> None:
        """Set the series of the evaluation, so that they are still scraped."""
        metrics.set_evaluation(self.split, self.metrics)
        metrics.set_failed_gates(0)
        if self.started and self.finished:
            metrics.restore_stage("publish", self.started, self.finished)

    def summary(self) -> list[str]:
        """Say in a few lines what was published and how good it is."""
        shown = ", ".join(f"{name} {value:.4f}" for name, value in list(self.metrics.items())[:SHOWN_METRICS])
        steps = [f"{stage} {took.step_seconds:.3g} s" for stage, took in self.stages.items() if took.step_seconds]
        waits = [
            f"held up {stage} for {100 * took.input_wait_share:.0f} % of its steps' time"
            for stage, took in self.stages.items()
            if took.input_wait_share
        ]
        return [
            f"Published {self.name} version {self.version}: {shown} on {self.images} images of the {self.split} split",
            f"  model   {self.uri}",
            f"  report  {self.report_uri}",
            *([f"  a step  {', '.join(steps)}"] if steps else []),
            *([f"  input   {', '.join(waits)}"] if waits else []),
        ]


def publish(job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace) -> Published:
    """Evaluate a trained classifier and hand it over as a new version of its model.

    Args:
        job: The job.
        classifier: The outcome of the last training stage.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The published version; the earlier one, if this run has published already.

    Raises:
        GateError: If a gate is not met; evaluation and report are in `runs/<run>/`, nothing else is changed.
        DataError: If there is nothing to evaluate on, or the model's answers are not numbers.
        RuntimeError: If what was exported does not answer as what was evaluated.
    """
    with workspace.metrics.track_stage("publish"):
        published = _done(job, classifier, workspace)
        if published:
            log.info("already published", model=published.uri)
            published.repeat(workspace.metrics)
            return published
        folder = workspace.scratch / "publish"
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier attempt left half done
        folder.mkdir(parents=True)
        assessed = _assess(job, classifier, dataset, workspace, folder)
        outcome = _hold_gates(assessed.outcome, workspace)
        outcome = _export(outcome, assessed, workspace, folder)
        published = _hand_over(outcome, classifier.file.sha256, workspace, folder / "version")
        shutil.rmtree(folder)
        return published


def published_earlier(job: TransferJob, storage: Storage) -> Published | None:
    """Find what a run has published, without training libraries.

    Args:
        job: The job of the run.
        storage: Storage of the job.

    Returns:
        The version; None if there is none, or if somebody has deleted it: it is then published under a new number.
    """
    data = storage.read(f"runs/{job.run}/publish/done.json")
    if data is None:
        return None
    where = storage.uri_of(f"runs/{job.run}/publish/done.json")
    published = read_json_record(Published, data, where, "what a published run leaves", "start over with --restart")
    return published if versions.published(storage, published.name, published.version) else None


def _done(job: TransferJob, classifier: Classifier, workspace: Workspace) -> Published | None:
    if published := published_earlier(job, workspace.storage):
        return published
    version = versions.made_from(workspace.storage, job.model_name, job.run, classifier.file.sha256)
    return _finish(job, version, workspace) if version else None


def _assess(
    job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace, folder: Path
) -> "Assessed":
    from topwork.report.held_out import assess

    assessed = assess(job, classifier, dataset, workspace, folder)
    evaluation = assessed.outcome.evaluation
    workspace.metrics.set_evaluation(evaluation.split, evaluation.values)
    log.info("evaluation", images=evaluation.images, split=evaluation.split, **assessed.outcome.metrics)
    return assessed


def _hold_gates(outcome: Outcome, workspace: Workspace) -> Outcome:
    """Check the gates and keep evaluation and report with the run, whether or not they hold."""
    latest = versions.latest(workspace.storage, outcome.job.model_name)
    gates = gate_outcomes(
        outcome.job.spec.evaluate.gates,
        outcome.evaluation.values,
        latest.metrics if latest else None,
        f"{latest.name}/{latest.version}" if latest else "",
    )
    workspace.metrics.set_failed_gates(sum(not gate.met for gate in gates))
    outcome = dataclasses.replace(outcome, gates=gates)
    storage, prefix = workspace.storage, f"runs/{outcome.job.run}"
    storage.write(f"{prefix}/metrics.json", metrics_json(outcome), content_type="application/json")
    storage.write(f"{prefix}/history.csv", history_csv(outcome.history), content_type="text/csv")
    storage.write(f"{prefix}/report.html", report_html(outcome).encode(), content_type="text/html; charset=utf-8")
    require_gates(gates, storage.uri_of(prefix))
    return outcome


def _export(outcome: Outcome, assessed: "Assessed", workspace: Workspace, folder: Path) -> Outcome:
    from topwork.data.decoding import resize
    from topwork.model.export import export_model
    from topwork.report.export_check import recheck

    formats = outcome.job.spec.publish.formats
    log.info("export", formats=" ".join(formats))
    version = folder / "version"
    version.mkdir()
    export_model(assessed.model, outcome.evaluation.class_names, formats, resize, version)
    found = recheck(version, assessed.questions, formats)
    log.info(
        "export check",
        images=found.images,
        largest_difference=max(found.largest_difference.values()),
        accepted=found.tolerance,
    )
    return dataclasses.replace(outcome, formats=formats, recheck=found)


def _hand_over(outcome: Outcome, weights: str, workspace: Workspace, folder: Path) -> Published:
    """Take a number, upload, and make it visible: manifest, then pointer, then the mark that this run is done."""
    storage, job = workspace.storage, outcome.job
    number = versions.claim(storage, job.model_name, job.run)
    prefix = versions.prefix_of(job.model_name, number)
    uri = storage.uri_of(prefix)
    outcome = dataclasses.replace(outcome, version=number, lineage={"Model": uri, **outcome.lineage})
    _write_papers(outcome, folder)
    version = Version(
        name=job.model_name,
        version=number,
        uri=uri,
        run=job.run,
        weights=weights,
        published=versions.now(),
        main_metric=outcome.main_metric,
        metrics=outcome.evaluation.values,
        split=outcome.evaluation.split,
        images=outcome.evaluation.images,
        dataset=dataset_prefix(outcome.facts.name, outcome.facts.fingerprint),
    )
    manifest = write_artifact(storage, prefix, folder, version.model_dump(mode="json"))
    if manifest.facts != version.model_dump(mode="json"):
        raise DataError(
            f"{uri} was published by another process of {job.run} at the same time. Let one process at a time work on "
            "a run, then start it again."
        )
    return _finish(job, version, workspace)


def _finish(job: TransferJob, version: Version, workspace: Workspace) -> Published:
    """Move the pointer and mark the run as done; the version is whole already."""
    versions.move_latest(workspace.storage, version.name)
    asked: list[str] = [*job.spec.evaluate.metrics, "loss"]
    published = Published(
        name=version.name,
        version=version.version,
        uri=version.uri,
        report_uri=f"{version.uri}/report.html",
        metrics={name: version.metrics[name] for name in asked if name in version.metrics},
        split=version.split,
        images=version.images,
        stages=_efforts(job, workspace.storage),
        started=workspace.metrics.stage_start_time("publish"),
        finished=datetime.now(UTC),
    )
    storage, key, data = workspace.storage, f"runs/{job.run}/publish/done.json", published.model_dump_json().encode()
    if not storage.write(key, data, only_if_absent=True, content_type="application/json"):
        # Another process of the run was faster, unless the mark is of a version that somebody has deleted.
        if standing := published_earlier(job, storage):
            return standing
        storage.write(key, data, content_type="application/json")
    return published


def _efforts(job: TransferJob, storage: Storage) -> dict[str, Effort]:
    efforts: dict[str, Effort] = {}
    for stage in STAGES:
        if (done := read_stage_result(storage, job.run, stage)) is not None:
            efforts[stage] = Effort(
                trainable=done.parameters.trainable,
                batch_size=batch_sizes(job)[stage],
                step_seconds=step_seconds(job, done.rows).get(stage),
                input_wait_share=input_wait_share(done.rows) if any(map(is_input_bound, done.rows)) else None,
            )
    return efforts


def _write_papers(outcome: Outcome, folder: Path) -> None:
    # One line a class, whatever characters the name of its folder has.
    labels = [" ".join(name.splitlines()) for name in outcome.evaluation.class_names]
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
    (folder / "metrics.json").write_bytes(metrics_json(outcome))
    (folder / "history.csv").write_bytes(history_csv(outcome.history))
    (folder / "spec.yaml").write_text(dump_job(outcome.job), "utf-8")
    (folder / "card.md").write_text(card_md(outcome), "utf-8")
    (folder / "report.html").write_text(report_html(outcome), "utf-8")
