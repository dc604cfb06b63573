"""What is known of a dataset in storage: the facts in its manifest."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

TFDS_NAME = "stored_images"
"""Name of every stored dataset inside its TFDS files."""


DATASETS = "datasets"
"""Folder of all stored datasets in storage."""


def dataset_prefix(name: str, fingerprint: str) -> str:
    """Key of the folder of a stored dataset."""
    return f"{DATASETS}/{name}/{fingerprint}"


class RejectedImage(BaseModel):
    """An image that was left out.

    Attributes:
        name: Where it came from, as the source calls it.
        reason: One of `topwork.data.image_validation.REASONS`.
        detail: What the decoder or the source said.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    reason: str
    detail: str = ""


class DatasetFacts(BaseModel):
    """The facts of a stored dataset.

    Attributes:
        name: Name of the dataset, from its source.
        fingerprint: 16 hex digits that stand for the source and its content.
        source: Where the images came from, without credentials.
        class_names: Classes, in the order of their labels.
        splits: Images of each class in each split of the source.
        images: Images stored.
        rejected: Images left out.
        duplicates: Images whose pixels were stored before.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    fingerprint: str
    source: dict[str, Any]
    class_names: tuple[str, ...]
    splits: dict[str, dict[str, int]]
    images: int
    rejected: tuple[RejectedImage, ...]
    duplicates: int

    @property
    def class_counts(self) -> dict[str, int]:
        """Images of each class over all splits of the source."""
        return {name: sum(counts.get(name, 0) for counts in self.splits.values()) for name in self.class_names}

    @property
    def origin(self) -> str:
        """Where the images came from, in a word: an address, or the name of a dataset of TFDS."""
        ((_, source),) = self.source.items()
        return str(source["uri"] if isinstance(source, dict) else source)


@dataclass(frozen=True)
class StoredDataset:
    """A dataset that stands whole in storage.

    Attributes:
        prefix: Its key, `datasets/<name>/<fingerprint>`, relative to the job's storage.
        facts: What its manifest says.
    """

    prefix: str
    facts: DatasetFacts


def shown_rejections(rejected: list[RejectedImage], most: int = 20) -> str:
    """Say which images were left out and why.

    Args:
        rejected: The images.
        most: How many are named.

    Returns:
        One sentence with the total and the first names.
    """
    if not rejected:
        return "None was left out."
    named = "; ".join(f"{image.name} ({image.reason})" for image in rejected[:most])
    more = f"; and {len(rejected) - most} more" if len(rejected) > most else ""
    return f"{len(rejected)} left out: {named}{more}."
