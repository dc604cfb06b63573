"""Reads what the splits of a job depend on besides its spec and its dataset."""

from topwork.clients.s3.storage import Storage
from topwork.data.splits.inputs import SplitInputs
from topwork.data.splits.lists import read_split_lists
from topwork.registry.evaluated_images import read_pinned_test
from topwork.spec import TransferJob
from topwork.spec.digest import digest_of


def read_split_inputs(job: TransferJob, storage: Storage) -> SplitInputs:
    """Read the lists of the splits and the pinned test set, without the training libraries.

    Args:
        job: The job.
        storage: Storage of the job, which also reads lists on S3.

    Returns:
        The inputs.

    Raises:
        DataError: If a list does not exist or is not valid, or the pinned version has no test set.
        UnavailableError: If storage cannot be reached.
    """
    splits = job.spec.dataset.split_settings
    pinned = read_pinned_test(storage, job.model_name, splits.pin_test) if splits.pin_test else None
    return SplitInputs(read_split_lists(splits.lists, storage), pinned)


def identify_split_images(dataset: str, inputs: SplitInputs) -> str:
    """Identify the images that a job is trained and measured on.

    Args:
        dataset: Key prefix of its stored dataset.
        inputs: What the splits depend on besides it.

    Returns:
        The key prefix; with lists of the splits or a pinned test set, also `#` and a digest of their content.

    Example:
        >>> identify_split_images("datasets/photos/425d7f53c70ed9c5", inputs)
        'datasets/photos/425d7f53c70ed9c5#5f125543'
    """
    content = inputs.content()
    return f"{dataset}#{digest_of(content)[:8]}" if content else dataset
