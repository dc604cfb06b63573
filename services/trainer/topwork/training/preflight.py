"""Preflight checks: whether splits, batch sizes, metrics and optimizers suit the stage and its replicas."""

import numpy as np
import structlog

from topwork.data.local_dataset import LocalDataset, Split
from topwork.errors import DataError, SpecError
from topwork.spec import TransferJob
from topwork.spec.optimizer import Optimizer
from topwork.spec.training import EarlyStopping
from topwork.training.plan import TrainingPlan

log = structlog.get_logger(__name__)

# With fewer classes, the true class is always among the five most probable ones.
MIN_CLASSES_FOR_TOP5 = 6


def check_data(job: TransferJob, plan: TrainingPlan, data: LocalDataset) -> None:
    """Reject splits that this stage, or a later stage of the job, cannot train on.

    Args:
        job: The job. The batch size of fine-tuning is also checked, so that it cannot fail after hours of transfer.
        plan: Plan of the stage that is about to start.
        data: Splits of the dataset.

    Raises:
        SpecError: If early stopping has no validation split to monitor.
        DataError: If the training split does not fill one batch, or AUC, which early stopping monitors, is undefined.
    """
    if plan.early_stopping and not (data.validation and data.validation.size):
        raise SpecError(
            f"earlyStopping of {plan.stage} monitors the validation split, but spec.dataset.splits has none. "
            "Add splits.validation or remove earlyStopping."
        )
    _check_monitors(job, data)
    batch_sizes = {"spec.transfer.batchSize": job.spec.transfer.batch_size}
    if job.spec.fine_tune and job.spec.fine_tune.batch_size:
        batch_sizes["spec.fineTune.batchSize"] = job.spec.fine_tune.batch_size
    for key, size in batch_sizes.items():
        if size > data.train.size:
            raise DataError(
                f"The training split has {data.train.size} images, fewer than {key} {size}: it does not fill one "
                f"batch. Use a batchSize of at most {data.train.size}, or more images in spec.dataset.splits.train."
            )


def _check_monitors(job: TransferJob, data: LocalDataset) -> None:
    stages: dict[str, EarlyStopping | None] = {"transfer": job.spec.transfer.early_stopping}
    if job.spec.fine_tune:
        stages["fineTune"] = job.spec.fine_tune.early_stopping
    for stage, early_stopping in stages.items():
        if early_stopping and early_stopping.monitor == "auc" and _occurring_classes(data.validation) < 2:
            raise DataError(
                f"spec.{stage}.earlyStopping.monitor is auc, which needs images of at least two classes, but the "
                "validation split has images of only one. Enlarge spec.dataset.splits.validation, or use monitor: loss."
            )


def check_metrics(job: TransferJob, data: LocalDataset) -> None:
    """Reject gates on metrics that say nothing about this dataset, and warn of such metrics.

    Args:
        job: The job.
        data: Splits of the dataset.

    Raises:
        DataError: If a gate would be met by every model, or by none.
    """
    if job.spec.dataset.folds and data.test is None:
        return  # the final model has the metrics of the folds
    is_tested = data.test is not None and job.spec.publish.enabled
    name, split = ("test", data.test) if is_tested else ("validation", data.validation)
    reasons = {}
    if (classes := len(data.class_names)) < MIN_CLASSES_FOR_TOP5:
        reasons["top5"] = (
            f"is 1 for every model, because the dataset has only {classes} classes: the true class is always among "
            "the five most probable ones. Use accuracy instead"
        )
    if _occurring_classes(split) < 2:
        reasons["auc"] = (
            f"is undefined, because the {name} split has images of only one class. Enlarge spec.dataset.splits.{name}, "
            "or use accuracy"
        )
    for index, gate in enumerate(job.spec.evaluate.gates):
        if gate.metric in reasons:
            raise DataError(f"spec.evaluate.gates.{index}: {gate.metric} {reasons[gate.metric]}.")
    for metric in job.spec.evaluate.metrics:
        if metric in reasons:
            log.warning("metric is not defined", metric=metric, reason=f"{metric} {reasons[metric]}.")


def _occurring_classes(split: Split | None) -> int:
    return len(np.unique(split.labels)) if split is not None else 0


def check_replicas(replicas: int, batch_size: int, optimizer: Optimizer) -> None:
    """Reject settings that several replicas do not support.

    Args:
        replicas: Number of replicas.
        batch_size: Global batch size: images per step over all replicas.
        optimizer: Settings of the optimizer.

    Raises:
        SpecError: If the batch size is not a multiple of the replicas, or the optimizer works on one replica only.
    """
    if replicas == 1:
        return
    if batch_size % replicas:
        multiple = batch_size - batch_size % replicas or replicas
        raise SpecError(f"batchSize {batch_size} is not a multiple of the {replicas} replicas. Use {multiple}.")
    if (steps := optimizer.gradient_accumulation_steps) is not None:
        raise SpecError(
            f"optimizer.gradientAccumulationSteps is {steps}, but with {replicas} replicas Keras crashes "
            "(keras#20582). Remove it or train on one GPU."
        )
