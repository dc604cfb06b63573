"""Metadata of a dataset in storage, as recorded in its manifest."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from topwork.artifacts import read_manifest
from topwork.clients.s3.storage import Storage
from topwork.data.images.value_range import ValueStatistics
from topwork.data.splits.inputs import SplitInputs
from topwork.errors import DataError

TFDS_NAME = "stored_images"
"""TFDS name of every stored dataset."""

DATASETS_PREFIX = "datasets"
"""Key prefix of all datasets in storage."""

ENTRIES_FILE = "entries.csv.gz"
"""Listing of the source in a stored dataset: path, class, size and version of each image, and split and group if a
table defines them."""

ORIGINALS_DIRECTORY = "originals"
"""Directory of the unmodified source files in a dataset."""

MAX_DETAIL_LENGTH = 120
"""Length of the detail of a rejected image in a message; the metadata contains all of it."""


def dataset_prefix(name: str, fingerprint: str) -> str:
    """Return the key prefix of a dataset in storage."""
    return f"{DATASETS_PREFIX}/{name}/{fingerprint}"


class RejectedImage(BaseModel):
    """An image that was rejected during the pull.

    Attributes:
        name: Name of the image in its source.
        reason: One of `topwork.data.images.image_validation.REASONS`.
        detail: Error message of the decoder or the source.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    reason: str
    detail: str = ""


class OriginalFile(BaseModel):
    """An unmodified file of the source, kept to check that served models predict source files like stored images.

    Attributes:
        file: Path in the directory of the dataset.
        kind: Format and pixels, as in `DatasetMetadata.kinds`.
        name: Name of the image in its source.
        label: Its class name.
        is_servable: Whether `topwork.data.images.decoding`, and therefore an exported model, can decode the file.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    kind: str
    name: str
    label: str
    is_servable: bool


class LabeledImage(BaseModel):
    """An image with its class.

    Attributes:
        name: Name of the image in its source.
        class_name: Its class.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    class_name: str


class Contradictions(BaseModel):
    """Images with identical pixels and different classes.

    Attributes:
        groups: Number of different images that occur with several classes.
        images: Number of copies of them, over all classes.
        dropped: Whether all copies were removed from the dataset.
        examples: Names and classes of the copies, for some of the groups.
    """

    model_config = ConfigDict(frozen=True)

    groups: int
    images: int
    dropped: bool
    examples: tuple[tuple[LabeledImage, ...], ...]

    def describe(self, limit: int = 5) -> str:
        """Return one sentence with the numbers and the first examples.

        Args:
            limit: Maximum number of groups to name.
        """
        named = "; ".join(
            " = ".join(f"{image.name} ({image.class_name})" for image in group[:limit])
            for group in self.examples[:limit]
        )
        more = f"; and {self.groups - limit} more" if self.groups > limit else ""
        return f"{self.images} images have the same pixels as an image of another class: {named}{more}."


class ClassSelectionSummary(BaseModel):
    """What `spec.dataset.classes` made of the classes of a source, as of the pull.

    Attributes:
        setting: The setting, as returned by `topwork.spec.classes.classes_content`.
        merged: The classes of the source that each merged or renamed class consists of.
        left_out: Number of images of each class of the source that was left out.
    """

    model_config = ConfigDict(frozen=True)

    setting: Any
    merged: dict[str, tuple[str, ...]]
    left_out: dict[str, int]

    def describe(self, limit: int = 10) -> tuple[str, ...]:
        """Return sentences on merged classes and on those that were left out; none if only their order was chosen.

        Args:
            limit: Maximum number of names in a sentence.
        """
        notes = [
            f"The class {name} contains the {'class' if len(sources) == 1 else 'classes'} "
            f"{_join(list(sources), limit)} of the source."
            for name, sources in self.merged.items()
        ]
        if len(notes) > limit:
            notes[limit:] = [f"Merged or renamed classes that are not listed: {len(notes) - limit}."]
        if self.left_out:
            images, classes = sum(self.left_out.values()), len(self.left_out)
            notes.append(
                f"Left out: {classes} {'class' if classes == 1 else 'classes'} of the source with {images} "
                f"{'image' if images == 1 else 'images'}, {_join(list(self.left_out), limit)}."
            )
        return tuple(notes)


def _join(names: list[str], limit: int) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class DatasetMetadata(BaseModel):
    """Metadata of a stored dataset.

    Attributes:
        name: Name of the dataset, derived from its source.
        fingerprint: 16 hex digits that identify the source and its content.
        pull_format: Version of the rules by which the images were stored; see `topwork.registry.datasets.FORMAT`.
        source: Where the images come from, without credentials.
        class_names: Class names, in label order.
        splits: Number of images per class, for each split of the source.
        images: Number of stored images.
        rejected: Images that were not stored.
        duplicates: Number of images with the same pixels as an earlier image.
        contradictions: Images with identical pixels and different classes; None if there are none.
        kinds: Number of source files by format and pixels, such as `PNG RGBA, transparency`. Empty if an older version
            of topwork stored the dataset.
        originals: A few unmodified source files, one of each kind.
        values: Pixel values of images with more than 8 bits per channel; None without such images.
        class_selection: What `spec.dataset.classes` made of the classes of the source; None if it was not set.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    fingerprint: str
    pull_format: int = 1
    source: dict[str, Any]
    class_names: tuple[str, ...]
    splits: dict[str, dict[str, int]]
    images: int
    rejected: tuple[RejectedImage, ...]
    duplicates: int
    contradictions: Contradictions | None = None
    kinds: dict[str, int] = {}
    originals: tuple[OriginalFile, ...] = ()
    values: ValueStatistics | None = None
    class_selection: ClassSelectionSummary | None = None

    @property
    def class_setting(self) -> Any:
        """`spec.dataset.classes` in the form of `pull_settings`; None if it was not set."""
        return self.class_selection and self.class_selection.setting

    @property
    def source_class_names(self) -> tuple[str, ...]:
        """Names in the source of the classes whose images are stored."""
        merged = self.class_selection.merged if self.class_selection else {}
        return tuple(source for name in self.class_names for source in merged.get(name, (name,)))

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of images per class, over all splits of the source."""
        return {name: sum(counts.get(name, 0) for counts in self.splits.values()) for name in self.class_names}

    @property
    def origin(self) -> str:
        """Where the images come from: a URI, or the name of a TFDS dataset."""
        return origin_of(self.source)


def origin_of(source: dict[str, Any]) -> str:
    """Return the URI in the description of a source, or the name of a TFDS dataset.

    Example:
        >>> origin_of({"folder": {"uri": "s3://photos/pets"}})
        's3://photos/pets'
    """
    ((_, settings),) = source.items()
    return str(settings["uri"] if isinstance(settings, dict) else settings)


@dataclass(frozen=True)
class StoredDataset:
    """A complete dataset in storage.

    Attributes:
        prefix: Its key prefix, `datasets/<name>/<fingerprint>`, relative to the job's storage.
        metadata: Metadata from its manifest.
        inputs: Further inputs of the splits of the job; None if they were not read. All stages of a process use the
            same ones, even if a list changes in the meantime.
    """

    prefix: str
    metadata: DatasetMetadata
    inputs: SplitInputs | None = None


def read_dataset_metadata(storage: Storage, prefix: str) -> DatasetMetadata | None:
    """Read the metadata of a stored dataset.

    Args:
        storage: Storage that contains the dataset.
        prefix: Key prefix of the dataset.

    Returns:
        The metadata, or None if the dataset does not exist or is incomplete.

    Raises:
        DataError: If the manifest does not describe a dataset.
    """
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        return None
    try:
        return DatasetMetadata.model_validate(manifest.facts)
    except ValidationError as error:
        raise DataError(
            f"The manifest at {storage.uri_of(prefix)} does not describe a topwork dataset: "
            f"{error.errors()[0]['msg']}. To pull the dataset again, delete everything under this prefix, the "
            "manifest first."
        ) from error


def format_rejections(rejected: list[RejectedImage], limit: int = 20) -> str:
    """Format a list of rejected images as one sentence.

    Args:
        rejected: The images.
        limit: Maximum number of images to name.

    Returns:
        The total, then the names, reasons and details of the first images.
    """
    if not rejected:
        return "No image was rejected."
    named = "; ".join(f"{image.name} ({_format_reason(image)})" for image in rejected[:limit])
    more = f"; and {len(rejected) - limit} more" if len(rejected) > limit else ""
    return f"{len(rejected)} rejected: {named}{more}."


def _format_reason(image: RejectedImage) -> str:
    return f"{image.reason}: {image.detail[:MAX_DETAIL_LENGTH]}" if image.detail else image.reason
