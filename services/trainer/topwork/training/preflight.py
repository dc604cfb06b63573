"""What can be said of a job's images before any of them is trained on."""

from topwork.data.local_dataset import LocalDataset
from topwork.errors import DataError, SpecError
from topwork.spec import TransferJob
from topwork.training.plan import Plan


def check_data(job: TransferJob, plan: Plan, data: LocalDataset) -> None:
    """Refuse splits with which a stage, or the one after it, could not train.

    Args:
        job: The job: its fine-tuning is looked at before hours of transfer, too.
        plan: The stage that is about to begin.
        data: Its images.

    Raises:
        SpecError: If early stopping has nothing to watch.
        DataError: If the training split does not fill one batch.
    """
    if plan.early_stopping and not (data.validation and data.validation.size):
        raise SpecError(
            f"earlyStopping of {plan.stage} watches the validation split, but spec.dataset.splits names none. "
            "Add splits.validation or take earlyStopping out."
        )
    sizes = {"spec.transfer.batchSize": job.spec.transfer.batch_size}
    if job.spec.fine_tune and job.spec.fine_tune.batch_size:
        sizes["spec.fineTune.batchSize"] = job.spec.fine_tune.batch_size
    for key, size in sizes.items():
        if size > data.train.size:
            raise DataError(
                f"The training split has {data.train.size} images, fewer than {key} {size}: not one whole batch. Use "
                f"a batchSize of at most {data.train.size}, or more images in spec.dataset.splits.train."
            )
