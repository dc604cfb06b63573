"""Preflight checks: whether splits, batch sizes and optimizers suit the stage and its replicas."""

from topwork.data.local_dataset import LocalDataset
from topwork.errors import DataError, SpecError
from topwork.spec import TransferJob
from topwork.spec.optimizer import Optimizer
from topwork.training.plan import TrainingPlan


def check_data(job: TransferJob, plan: TrainingPlan, data: LocalDataset) -> None:
    """Reject splits that this stage, or a later stage of the job, cannot train on.

    Args:
        job: The job. The batch size of fine-tuning is also checked, so that it cannot fail after hours of transfer.
        plan: Plan of the stage that is about to start.
        data: Splits of the dataset.

    Raises:
        SpecError: If early stopping has no validation split to monitor.
        DataError: If the training split does not fill one batch.
    """
    if plan.early_stopping and not (data.validation and data.validation.size):
        raise SpecError(
            f"earlyStopping of {plan.stage} monitors the validation split, but spec.dataset.splits has none. "
            "Add splits.validation or remove earlyStopping."
        )
    batch_sizes = {"spec.transfer.batchSize": job.spec.transfer.batch_size}
    if job.spec.fine_tune and job.spec.fine_tune.batch_size:
        batch_sizes["spec.fineTune.batchSize"] = job.spec.fine_tune.batch_size
    for key, size in batch_sizes.items():
        if size > data.train.size:
            raise DataError(
                f"The training split has {data.train.size} images, fewer than {key} {size}: it does not fill one "
                f"batch. Use a batchSize of at most {data.train.size}, or more images in spec.dataset.splits.train."
            )


def check_replicas(replicas: int, batch_size: int, optimizer: Optimizer) -> None:
    """Reject settings that MirroredStrategy does not support in `fit`.

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
    unsupported = {
        "gradientAccumulationSteps": (optimizer.gradient_accumulation_steps, "Keras crashes (keras#20582)"),
        "globalClipnorm": (optimizer.global_clipnorm, "each replica clips before the gradients are summed"),
    }
    for key, (value, reason) in unsupported.items():
        if value is not None:
            raise SpecError(
                f"optimizer.{key} is {value}, but with {replicas} replicas {reason}. "
                "Remove it or train on one GPU (clipnorm and clipvalue work everywhere)."
            )
