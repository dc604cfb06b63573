"""Finds the number of classes and images of a job without pulling its dataset."""

from contextlib import suppress
from dataclasses import dataclass, field

from topwork.data.dataset_manifest import StoredDataset
from topwork.data.splits.counts import check_splits, count_images, describe_splits
from topwork.data.splits.inputs import SplitInputs
from topwork.data.tfds_mirror import TfdsName
from topwork.errors import DataError, UnavailableError
from topwork.registry.datasets import list_datasets
from topwork.registry.split_inputs import read_split_inputs
from topwork.spec import TransferJob
from topwork.spec.dataset import Dataset, DatasetSource, pull_settings
from topwork.stages.pull import find_dataset
from topwork.workspace import Workspace

TRAIN = "train"


@dataclass(frozen=True)
class KnownDataset:
    """Known facts about the images of a job.

    Attributes:
        classes: Number of classes; None if unknown.
        images: Number of images of each split in the spec; None if unknown.
        dataset: URI of the stored dataset; None if the facts come from the spec and the command line.
        notes: Notes for the user.
    """

    classes: int | None
    images: dict[str, int | None]
    dataset: str | None = None
    notes: tuple[str, ...] = field(default=())


def find_known_dataset(
    job: TransferJob, workspace: Workspace | None, classes: int | None, images: int | None
) -> KnownDataset:
    """Find the number of classes and images: from the stored dataset, otherwise from the command line.

    Args:
        job: The job.
        workspace: Storage that may contain the dataset; None if it is unavailable.
        classes: Number of classes, as given on the command line.
        images: Number of images in the train split of the source, as given on the command line.

    Returns:
        The known facts.

    Raises:
        DataError: If the dataset has too few images for the splits.
    """
    splits = job.spec.dataset.split_settings
    stored = _find_stored_dataset(job, workspace) if workspace else None
    inputs, problem = _read_inputs(job, workspace)
    if stored is None or workspace is None:
        listed = _count_listed_classes(job.spec.dataset)
        notes = _ignored(("--classes", classes, listed, "spec.dataset.classes")) if listed else ()
        classes = listed or classes
        counts = count_images(splits, {TRAIN: images} if images else {}, classes, inputs=inputs)
        return KnownDataset(classes, counts, notes=(*notes, *problem))
    facts = stored.metadata
    check_splits(job.spec.dataset, facts)
    sizes = {name: sum(counts.values()) for name, counts in facts.splits.items()}
    ignored = _ignored(
        ("--classes", classes, len(facts.class_names), "the stored dataset"),
        ("--images", images, sizes.get(TRAIN), "the stored dataset"),
    )
    selection = facts.class_selection.describe() if facts.class_selection else ()
    return KnownDataset(
        len(facts.class_names),
        count_images(splits, sizes, len(facts.class_names), facts.class_counts, inputs),
        workspace.storage.uri_of(stored.prefix),
        (*ignored, *selection, *problem, *describe_splits(job.spec.dataset, facts, inputs)),
    )


def _count_listed_classes(settings: Dataset) -> int | None:
    """Return the number of classes that a spec lists; None if it lists none, or only those that it excludes."""
    return len(settings.classes) if isinstance(settings.classes, tuple) else None


def _ignored(*options: tuple[str, int | None, int | None, str]) -> tuple[str, ...]:
    """Return a note for each option with another value than the actual one."""
    return tuple(
        f"{option} {value} is ignored: {origin} has {actual}."
        for option, value, actual, origin in options
        if value not in {None, actual}
    )


def _read_inputs(job: TransferJob, workspace: Workspace | None) -> tuple[SplitInputs | None, tuple[str, ...]]:
    """Read the inputs of the splits; None and the reason if they cannot be read from here."""
    try:
        return (read_split_inputs(job, workspace.storage) if workspace else None), ()
    except (DataError, UnavailableError) as error:
        return None, (str(error),)


def _find_stored_dataset(job: TransferJob, workspace: Workspace) -> StoredDataset | None:
    """Find the dataset of the source as it is now, or an earlier one of the same source."""
    # A source that cannot be read from here may be readable where the job runs.
    with suppress(DataError, UnavailableError):
        if dataset := find_dataset(job, workspace):
            return dataset
    classes = pull_settings(job.spec.dataset).get("classes")
    datasets = [stored for stored in list_datasets(workspace.storage) if stored.metadata.class_setting == classes]
    return _match_source(job.spec.dataset.source, datasets)


def _match_source(source: DatasetSource, datasets: list[StoredDataset]) -> StoredDataset | None:
    if source.tfds:
        by_name = {
            str(dataset.metadata.source["tfds"]): dataset for dataset in datasets if "tfds" in dataset.metadata.source
        }
        try:
            name = TfdsName.parse(source.tfds).select(by_name, None)
        except DataError:
            return None  # several configs are stored, and only TFDS knows the default config
        return by_name[name] if name else None
    kind, settings = next((kind, part) for kind, part in source if part is not None)
    expected = settings.model_dump(mode="json")
    matches = [dataset for dataset in datasets if _is_same_source(expected, dataset.metadata.source.get(kind))]
    return matches[-1] if matches else None


def _is_same_source(expected: dict[str, object], stored: object) -> bool:
    """Compare URIs without trailing slashes, as stored in dataset metadata."""
    return isinstance(stored, dict) and all(
        str(stored.get(key) or "").strip("/") == str(value or "").strip("/") for key, value in expected.items()
    )
