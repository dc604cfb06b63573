"""What is known of a job's images without pulling them."""

from contextlib import suppress
from dataclasses import dataclass, field

from topwork.artifacts import MANIFEST_NAME
from topwork.data.dataset_manifest import StoredDataset, read_dataset_metadata
from topwork.data.splits import check_splits, count_images
from topwork.data.tfds_mirror import TfdsName
from topwork.errors import DataError
from topwork.spec import TransferJob
from topwork.spec.dataset import DatasetSource
from topwork.stages.pull import find_pulled_dataset
from topwork.workspace import Workspace

TRAIN = "train"
ROOT = "datasets/"


@dataclass(frozen=True)
class KnownData:
    """What is known of a job's images.

    Attributes:
        classes: Number of classes; None where nobody says.
        images: Images of each split that the spec names; None where nobody says.
        dataset: Address of the stored dataset that says so; None where it is the spec and the command line.
        notes: What a user should know beside that.
    """

    classes: int | None
    images: dict[str, int | None]
    dataset: str | None = None
    notes: tuple[str, ...] = field(default=())


def known_data(job: TransferJob, workspace: Workspace | None, classes: int | None, images: int | None) -> KnownData:
    """Find the number of classes and images: of the stored dataset, else as the user says.

    Args:
        job: The job.
        workspace: Storage, where the dataset may be; None where it can't be reached.
        classes: Number of classes, as the user says.
        images: Images of the source's train split, as the user says.

    Returns:
        What is known.

    Raises:
        DataError: If the splits can't be filled.
    """
    splits = job.spec.dataset.splits
    stored = _stored(job, workspace) if workspace else None
    if stored is None or workspace is None:
        return KnownData(classes, count_images(splits, {TRAIN: images} if images else {}, classes))
    facts = stored.metadata
    check_splits(splits, facts)
    sizes = {name: sum(counts.values()) for name, counts in facts.splits.items()}
    there = {"--classes": (classes, len(facts.class_names)), "--images": (images, sizes.get(TRAIN))}
    return KnownData(
        len(facts.class_names),
        count_images(splits, sizes, len(facts.class_names)),
        workspace.storage.uri_of(stored.prefix),
        tuple(
            f"{option} {said} is not needed: the stored dataset has {found}."
            for option, (said, found) in there.items()
            if said not in {None, found}
        ),
    )


def _stored(job: TransferJob, workspace: Workspace) -> StoredDataset | None:
    """Find what this run has pulled, or else what another job has pulled of the same source."""
    if earlier := find_pulled_dataset(job, workspace):
        return earlier
    found: dict[str, StoredDataset] = {}
    for stored in workspace.storage.list(ROOT):
        prefix, _, name = stored.key.rpartition("/")
        # A folder that is broken, or of a newer topwork, is none that this job would find.
        with suppress(DataError):
            if name == MANIFEST_NAME and (facts := read_dataset_metadata(workspace.storage, prefix)):
                found[prefix] = StoredDataset(prefix, facts)
    return _of_source(job.spec.dataset.source, list(found.values()))


def _of_source(source: DatasetSource, found: list[StoredDataset]) -> StoredDataset | None:
    if source.tfds:
        by_name = {str(one.metadata.source["tfds"]): one for one in found if "tfds" in one.metadata.source}
        try:
            name = TfdsName.parse(source.tfds).select(by_name, None)
        except DataError:
            return None  # several configurations are there, and only TFDS itself knows which is the default
        return by_name[name] if name else None
    kind, settings = next((kind, part) for kind, part in source if part is not None)
    asked = settings.model_dump(mode="json")
    same = [one for one in found if _same(asked, one.metadata.source.get(kind))]
    return same[-1] if same else None


def _same(asked: dict[str, object], stored: object) -> bool:
    """Compare addresses as the sources write them down: without a slash at the end."""
    return isinstance(stored, dict) and all(
        str(stored.get(key) or "").strip("/") == str(value or "").strip("/") for key, value in asked.items()
    )
