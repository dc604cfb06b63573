"""The validate stage: the end of a run that publishes nothing. Evaluates its classifier on the validation split."""

import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog
from pydantic import BaseModel, ConfigDict

from topwork.artifacts import read_json_record
from topwork.clients.prometheus.metrics import Metrics
from topwork.data.dataset_manifest import StoredDataset
from topwork.registry.cross_validation import format_images
from topwork.registry.kept_weights import KeptWeights
from topwork.registry.runs import validation_key
from topwork.registry.split_inputs import identify_split_images, read_split_inputs
from topwork.registry.stage_keys import stage_keys
from topwork.registry.stage_results import Classifier
from topwork.spec import TransferJob
from topwork.workspace import Workspace

if TYPE_CHECKING:
    from topwork.report.evaluation import Evaluation

log = structlog.get_logger(__name__)


class Validated(BaseModel):
    """The result of a run that publishes nothing, stored as `runs/<run>/validation.json`.

    Attributes:
        format: Version of this record.
        key: Key of training and evaluation; see `topwork.registry.stage_keys`.
        run: Name of the run.
        metrics: The metrics requested by the job that are defined, in the order of the spec, and the loss. They are
            those of the kept weights, on the images of the validation split, which also selected these weights.
        undefined: Requested metrics without a value, and why.
        images: Number of images in the validation split.
        dataset: Identifies the images; see `identify_split_images`.
        weights: Stage and epoch that the weights come from.
        classifier_uri: URI of the classifier.
        started: Start of the evaluation.
        finished: End of the evaluation.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    key: str
    run: str
    metrics: dict[str, float]
    undefined: dict[str, str] = {}
    images: int
    dataset: str
    weights: KeptWeights
    classifier_uri: str
    started: datetime
    finished: datetime

    def restore_metrics(self, metrics: Metrics) -> None:
        """Set the Prometheus metrics of the evaluation, so that a resumed run exposes them too."""
        metrics.set_evaluation("validation", self.metrics)
        metrics.restore_stage("publish", self.started, self.finished)

    def summary(self) -> list[str]:
        """Summarize the metrics in a few lines."""
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return [
            f"Trained {self.run}: {shown} on {format_images(self.images, 'validation')}; nothing is published",
            f"  weights {self.classifier_uri}",
            "  note    The validation split also selected these weights, so its metrics are optimistic.",
            *(f"  note    {name} is not reported: {reason}." for name, reason in self.undefined.items()),
            *([f"  note    {self.weights.note}"] if self.weights.note else []),
        ]


def validate(job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace) -> Validated:
    """Evaluate a trained classifier on the validation split in float32, like `publish` on the test split.

    Args:
        job: The job.
        classifier: The result of the last training stage.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The metrics; those of an earlier process if it has evaluated this run.

    Raises:
        DataError: If there is no validation split, or a predicted probability is not finite.
        UnavailableError: If storage failed.
    """
    with workspace.metrics.track_stage("publish"):
        if validated := find_validated(job, dataset, workspace):
            return validated
        evaluation = _evaluate(job, classifier, dataset, workspace)
        requested: list[str] = [*job.spec.evaluate.metrics, "loss"]
        validated = Validated(
            key=_key(job, dataset, workspace),
            run=job.run,
            metrics={name: evaluation.metrics[name] for name in requested if name in evaluation.metrics},
            undefined={name: evaluation.undefined[name] for name in requested if name in evaluation.undefined},
            images=evaluation.images,
            dataset=identify_split_images(dataset.prefix, dataset.inputs or read_split_inputs(job, workspace.storage)),
            weights=classifier.kept,
            classifier_uri=workspace.storage.uri_of(classifier.key),
            started=workspace.metrics.stage_start_time("publish"),
            finished=datetime.now(UTC),
        )
        validated.restore_metrics(workspace.metrics)
        log.info("evaluation", images=validated.images, split="validation", **validated.metrics)
        data = validated.model_dump_json(indent=1).encode()
        workspace.storage.write(validation_key(job.run), data, content_type="application/json")
        return validated


def find_validated(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> Validated | None:
    """Find the metrics of a run that is complete. Does not import training libraries.

    Args:
        job: The job of the run.
        dataset: The stored dataset.
        workspace: Storage of the job, and metrics, which show the evaluation again.

    Returns:
        The metrics; None if the run has not been evaluated, or with other settings.
    """
    name = validation_key(job.run)
    data = workspace.storage.read(name)
    if data is None:
        return None
    validated = read_json_record(
        Validated, data, workspace.storage.uri_of(name), "a result of validation", "start over with --restart"
    )
    if validated.key != _key(job, dataset, workspace):
        return None
    log.info("already evaluated", run=job.run)
    validated.restore_metrics(workspace.metrics)
    return validated


def _key(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> str:
    return stage_keys(job, dataset.metadata.fingerprint, workspace.storage, dataset.inputs).publish


def _evaluate(job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace) -> "Evaluation":
    from topwork.stages.validation_metrics import evaluate_on_validation

    folder = workspace.scratch / "validate"
    shutil.rmtree(folder, ignore_errors=True)  # leftovers of an earlier attempt
    folder.mkdir(parents=True)
    evaluation = evaluate_on_validation(job, classifier, dataset, workspace, folder)
    shutil.rmtree(folder)
    return evaluation
