"""TransferJob, the root of the job spec, and the rules that check several sections of it together."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PrivateAttr, StrictBool, StrictInt

from topwork.spec.applications import MIN_SIDE
from topwork.spec.compute import Compute, Metrics
from topwork.spec.dataset import Dataset
from topwork.spec.digest import digest_of, result_content
from topwork.spec.evaluation import Evaluate, Publish
from topwork.spec.fine_tune import FineTune, UnfreezeSteps
from topwork.spec.kubernetes_types import (
    AnnotationKey,
    AnnotationValue,
    DnsLabel,
    LabelKey,
    LabelValue,
    NamespaceName,
)
from topwork.spec.messages import count_noun, format_value
from topwork.spec.model import Augmentation, Model
from topwork.spec.optimizer import Optimizer
from topwork.spec.spec_model import SpecModel, Violation, rule
from topwork.spec.tracking import Tracking
from topwork.spec.training import Transfer
from topwork.spec.uris import StorageUri, prefixes_overlap


class Metadata(SpecModel):
    """Name, namespace, labels and annotations of the job, as in any Kubernetes object."""

    name: DnsLabel = Field(description="Name of the job, its dataset and, unless spec.publish.name is set, its model.")
    namespace: NamespaceName | None = Field(
        default=None, description="Namespace of the job in a cluster. Unset: that of the command line."
    )
    labels: dict[LabelKey, LabelValue] = Field(
        default={}, description="Labels that are added to every Kubernetes object of the job."
    )
    annotations: dict[AnnotationKey, AnnotationValue] = Field(
        default={}, description="Annotations of the TransferJob in a cluster. They do not affect the run."
    )


class JobSpec(SpecModel):
    """The desired training: dataset, model, stages, evaluation, publishing and resources."""

    storage: StorageUri = Field(
        description="S3 bucket and prefix (s3://bucket/prefix) for datasets, runs and models. Endpoint and "
        "credentials come from environment variables, not from the spec."
    )
    dataset: Dataset = Field(description="Source, splits and size of the images.")
    model: Model = Field(description="Base and head of the classifier.")
    augmentation: Augmentation = Field(default=Augmentation(), description="Random transformations of training images.")
    transfer: Transfer = Field(default=Transfer(), description="Stage 1: training of the head on a frozen base.")
    fine_tune: FineTune | None = Field(
        default=None, description="Stage 2: training of part or all of the base. Unset: no fine-tuning."
    )
    evaluate: Evaluate = Field(default=Evaluate(), description="Metrics and gates.")
    publish: Publish = Field(
        default=Publish(), description="Whether, under which name and in which formats the model is published."
    )
    compute: Compute = Field(default=Compute(), description="Resources and scheduling of the Kubernetes Job.")
    metrics: Metrics = Field(default=Metrics(), description="Export of Prometheus metrics.")
    tracking: Tracking = Field(default=Tracking(), description="Records for TensorBoard and MLflow.")
    seed: StrictInt = Field(default=42, ge=0, le=2**31 - 1, description="Seed of all random number generators.")
    suspend: StrictBool = Field(
        default=False,
        description="Whether to stop the run with a checkpoint and free its GPUs; false resumes it. Applies to "
        "TransferJobs in a cluster with the controller.",
    )

    @property
    def publishes(self) -> bool:
        """Whether the job publishes a model; cross-validation does so only on request."""
        return self.publish.enabled and (not self.dataset.folds or self.publish.fold == "all")


class TransferJob(SpecModel):
    """A TransferJob trains an image classifier by transfer learning, and publishes it to object storage."""

    api_version: Literal["topwork.dev/v1alpha1"] = Field(description="Version of the spec format.")
    kind: Literal["TransferJob"] = Field(description="Kind of the object.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations of the job.")
    spec: JobSpec = Field(description="The desired training.")

    _run: str = PrivateAttr("")

    @property
    def digest(self) -> str:
        """SHA-256 in hex of all fields that can affect what the job does; see `topwork.spec.digest`."""
        return digest_of(result_content(self.spec))

    @property
    def run(self) -> str:
        """Name of the run, `<name>-<8 hex digits>`.

        By default, the digits are those of `digest`: a Kubernetes Job cannot be changed, so a job that does something
        else needs another name. Results are not stored by this name, but by the keys of their stages.
        """
        return self._run or f"{self.metadata.name}-{self.digest[:8]}"

    def as_run(self, name: str) -> "TransferJob":
        """Return a copy of the job with another name of its run, such as one that depends on the dataset, too."""
        job = self.model_copy()
        job._run = name
        return job

    def with_fold(self, fold: int | None) -> "TransferJob":
        """Return a copy of the job that trains only one fold of cross-validation, or all images if `fold` is None."""
        dataset = self.spec.dataset
        if dataset.fold == fold:
            return self
        splits = dataset.split_settings.model_copy(update={"fold": fold})
        spec = self.spec.model_copy(update={"dataset": dataset.model_copy(update={"splits": splits})})
        return self.model_copy(update={"spec": spec})

    @property
    def model_name(self) -> str:
        """Name of the published model."""
        return self.spec.publish.name or self.metadata.name


@rule(JobSpec)
def batch_size_is_divisible_by_replicas(spec: JobSpec) -> Iterator[Violation]:
    """Each replica gets an equal part of the global batch; uneven parts crash in AddN (keras#19246)."""
    sizes = {"transfer": spec.transfer.batch_size, "fineTune": spec.fine_tune.batch_size if spec.fine_tune else None}
    nodes, gpus, replicas = spec.compute.nodes, spec.compute.gpus, spec.compute.replicas
    divisor = f"spec.compute.gpus {gpus}"
    if nodes > 1:
        divisor = f"spec.compute.nodes {nodes}" + (f" * gpus {gpus} = {replicas}" if gpus > 1 else "")
    for stage, size in sizes.items():
        if size and size % replicas:
            multiples = ([size // replicas * replicas] if size > replicas else []) + [(size // replicas + 1) * replicas]
            yield Violation(
                f"{stage}.batchSize",
                f"{size} is not divisible by {divisor}, but each replica processes an equal part of the global batch. "
                f"Try {' or '.join(map(str, multiples))}.",
            )


@rule(JobSpec)
def gradient_accumulation_requires_one_replica(spec: JobSpec) -> Iterator[Violation]:
    """Keras crashes when it accumulates gradients under MirroredStrategy (keras#20582)."""
    counts = {"nodes": spec.compute.nodes, "gpus": spec.compute.gpus}
    several = {key: count for key, count in counts.items() if count > 1}
    for stage, optimizer in _optimizers(spec).items():
        if several and optimizer.gradient_accumulation_steps is not None:
            yield Violation(
                f"{stage}.optimizer.gradientAccumulationSteps",
                f"{optimizer.gradient_accumulation_steps} is not supported with spec.compute."
                f"{' and '.join(f'{key} {count}' for key, count in several.items())}: "
                "Keras crashes when it accumulates gradients over several replicas (keras#20582). Remove it, or set "
                f"{' and '.join(f'{key}: 1' for key in several)}.",
            )


@rule(JobSpec)
def fine_tune_learning_rate_is_not_higher(spec: JobSpec) -> Iterator[Violation]:
    """A higher learning rate destroys pretrained weights. Checked only if both stages use the same optimizer."""
    if not spec.fine_tune or not spec.model.base.is_pretrained:
        return
    transfer, fine_tune = spec.transfer.optimizer, spec.fine_tune.optimizer
    if transfer.name != fine_tune.name:
        return
    unfreeze = spec.fine_tune.unfreeze
    rates = {"optimizer.learningRate": fine_tune.learning_rate}
    if isinstance(unfreeze, UnfreezeSteps):
        rates = {
            f"unfreeze.steps.{index}.learningRate": step.learning_rate for index, step in enumerate(unfreeze.steps)
        }
    for path, rate in rates.items():
        if rate > transfer.learning_rate:
            yield Violation(
                f"fineTune.{path}",
                f"{format_value(rate)} is above spec.transfer.optimizer.learningRate "
                f"{format_value(transfer.learning_rate)}. A higher learning rate destroys pretrained weights. Try a "
                f"tenth of it, {format_value(transfer.learning_rate / 10)}.",
            )


@rule(JobSpec)
def early_stopping_requires_validation(spec: JobSpec) -> Iterator[Violation]:
    """Training metrics nearly always improve; only validation metrics show when to stop."""
    stages = {"transfer": spec.transfer.early_stopping}
    if spec.fine_tune:
        stages["fineTune"] = spec.fine_tune.early_stopping
    for stage, early_stopping in stages.items():
        if early_stopping and not spec.dataset.has_validation:
            yield Violation(
                f"{stage}.earlyStopping",
                f"monitors the validation {early_stopping.monitor}, but there is no validation split. Add "
                "spec.dataset.splits.validation, or remove earlyStopping.",
            )


@rule(JobSpec)
def unpublished_model_is_measured_on_validation(spec: JobSpec) -> Iterator[Violation]:
    """Without publishing, a run ends with its metrics on the validation split, and no gate is checked."""
    if spec.publish.enabled:
        return
    if spec.dataset.folds:
        yield Violation(
            "publish.enabled",
            "false cannot be combined with spec.dataset.splits.folds: cross-validation measures each model on the test "
            "split of its fold, and publishes nothing unless publish.fold is set. Remove enabled.",
        )
    elif not spec.dataset.has_validation:
        yield Violation(
            "publish.enabled",
            "false ends the run with its metrics on the validation split, but there is none. Add "
            "spec.dataset.splits.validation, or remove enabled.",
        )
    if spec.evaluate.gates:
        yield Violation(
            "evaluate.gates",
            f"{count_noun(len(spec.evaluate.gates), 'gate')} would never be checked, because publish.enabled is false. "
            "Remove the gates, or publish.enabled.",
        )


@rule(JobSpec)
def calibration_requires_validation(spec: JobSpec) -> Iterator[Violation]:
    """Probabilities of training images are too confident, and the test split must not select anything."""
    if spec.evaluate.calibration != "none" and not spec.dataset.has_validation:
        yield Violation(
            "evaluate.calibration",
            f"{spec.evaluate.calibration} is fitted on the validation split, but there is none. Add "
            "spec.dataset.splits.validation, or remove calibration.",
        )


@rule(JobSpec)
def final_model_requires_all_folds(spec: JobSpec) -> Iterator[Violation]:
    """The metrics of a model that is trained on all images are those of all folds."""
    if spec.publish.fold and not spec.dataset.folds:
        yield Violation(
            "publish.fold", "applies only to cross-validation. Set spec.dataset.splits.folds, or remove fold."
        )
    elif spec.publish.fold and spec.dataset.fold:
        yield Violation(
            "publish.fold",
            f"all needs the metrics of all folds, but spec.dataset.splits.fold selects fold {spec.dataset.fold}. "
            "Remove one of them.",
        )


@rule(JobSpec)
def cross_validation_does_not_compare_versions(spec: JobSpec) -> Iterator[Violation]:
    """The latest version may have been trained on any of the images, so no fold can tell which model is better."""
    for index, gate in enumerate(spec.evaluate.gates):
        conditions = {
            "atLeastLatestMinus": gate.at_least_latest_minus,
            "notWorseThanLatest": gate.not_worse_than_latest,
        }
        for key in (key for key, value in conditions.items() if spec.dataset.folds and value is not None):
            yield Violation(
                f"evaluate.gates.{index}.{key}",
                "cannot be combined with spec.dataset.splits.folds: the latest version may have been trained on the "
                "images of every fold. Use atLeast.",
            )


@rule(JobSpec)
def image_size_is_supported(spec: JobSpec) -> Iterator[Violation]:
    """Keras rejects images below a minimum size that depends on the application."""
    application = spec.model.base.application
    minimum = MIN_SIDE[application] if application else 0
    for index, side in enumerate(spec.dataset.image_size):
        if side < minimum:
            yield Violation(
                f"dataset.imageSize.{index}",
                f"{side} is too small for {application}, which needs at least {minimum} pixels.",
            )


@rule(JobSpec)
def storage_does_not_overlap_the_images(spec: JobSpec) -> Iterator[Violation]:
    """Runs, datasets and models in the folder of the images would become classes, and images would mix with results."""
    folder = spec.dataset.source.folder
    if folder and folder.uri.startswith("s3://") and prefixes_overlap(spec.storage, folder.uri):
        yield Violation(
            "storage",
            f"{format_value(spec.storage)} overlaps spec.dataset.source.folder.uri {format_value(folder.uri)}: each "
            "directory in the folder is a class, so runs and models must be stored elsewhere. Use prefixes of which "
            "neither contains the other, such as s3://bucket/topwork and s3://bucket/photos.",
        )


@rule(JobSpec)
def cnn_is_trained(spec: JobSpec) -> Iterator[Violation]:
    """A cnn starts from random weights, and a head cannot learn much from a frozen random base."""
    if spec.transfer.train == "head" and spec.model.base.cnn:
        yield Violation(
            "transfer.train",
            "head would freeze the cnn at its random weights. Set train: all.",
        )


def _optimizers(spec: JobSpec) -> dict[str, Optimizer]:
    optimizers = {"transfer": spec.transfer.optimizer}
    return optimizers | ({"fineTune": spec.fine_tune.optimizer} if spec.fine_tune else {})
