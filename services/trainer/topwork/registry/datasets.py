"""The dataset that a job uses: found by the fingerprint of its source, and compared with the one used before."""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import (
    DATASETS_PREFIX,
    ENTRIES_FILE,
    StoredDataset,
    dataset_prefix,
    read_dataset_metadata,
)
from topwork.data.sources import Source, open_dataset_source
from topwork.data.sources.source import SourceEntry
from topwork.errors import DataError
from topwork.registry import versions
from topwork.registry.dataset_changes import describe_changes
from topwork.spec import TransferJob
from topwork.spec.dataset import Dataset, pull_settings
from topwork.spec.digest import DIGEST_LENGTH, digest_of
from topwork.workspace import Workspace

FORMAT = 2
"""Version of the stored dataset format. It is part of every fingerprint, so a new version pulls every dataset again."""


@dataclass(frozen=True)
class SelectedDataset:
    """The dataset of a source as it is now, or the one that the user pinned.

    Attributes:
        fingerprint: Fingerprint of the dataset.
        stored: The dataset in storage; None if it has to be pulled.
        changes: How the source differs from the dataset used before; empty if it does not or if there is none.
        is_pinned: Whether the user keeps the previous dataset.
    """

    fingerprint: str
    stored: StoredDataset | None
    changes: str = ""
    is_pinned: bool = False


@dataclass(frozen=True)
class PreviousDataset:
    """The dataset that was used before.

    Attributes:
        dataset: The dataset in storage.
        used_by: What used it: `version 4`, or `the last pull`.
    """

    dataset: StoredDataset
    used_by: str


def fingerprint_of(source: Source, settings: Dataset) -> str:
    """Compute the fingerprint of the dataset that a source would give.

    Args:
        source: The source.
        settings: `spec.dataset`, whose settings can change what is stored.

    Returns:
        16 hex digits, by the location, the content as far as it is known without reading images, and the settings.
    """
    content = {"format": FORMAT, "source": source.description(), "content": source.digest()}
    if changed := pull_settings(settings):
        content["settings"] = changed
    return digest_of(content)[:DIGEST_LENGTH]


def select_dataset(
    job: TransferJob, workspace: Workspace, *, pinned: bool = False, download: bool = True
) -> SelectedDataset | None:
    """Find the dataset that a job uses, without reading images and without TensorFlow.

    Args:
        job: The job.
        workspace: Storage, and scratch for a table on S3.
        pinned: Whether to keep the dataset that was used before, even if the source has changed.
        download: Whether to download an archive from a web server that does not say which version it has.

    Returns:
        The dataset; None for TFDS, whose versions never change, and for an archive that would have to be downloaded.

    Raises:
        DataError: If the source is invalid, or `pinned` and no dataset of this source is stored.
        UnavailableError: If the source or storage cannot be reached.
    """
    if job.spec.dataset.source.tfds:
        return None
    source = open_dataset_source(job.spec.dataset, workspace)
    previous = find_previous_dataset(job, source, workspace.storage)
    if pinned:
        return _pin(source, previous)
    if not download and not source.is_versioned:
        return None
    fingerprint = fingerprint_of(source, job.spec.dataset)
    stored = read_stored_dataset(workspace.storage, dataset_prefix(source.name, fingerprint))
    selected = SelectedDataset(fingerprint, stored)
    if previous is None or previous.dataset.metadata.fingerprint == fingerprint:
        return selected
    if previous.dataset.metadata.pull_format != FORMAT:
        changes = "topwork stores images in another way"
    else:
        changes = describe_changes(read_entries(previous.dataset, workspace.storage), source.entries())
    return replace(selected, changes=f"{changes or 'settings of the pull changed'} since {previous.used_by}")


def _pin(source: Source, previous: PreviousDataset | None) -> SelectedDataset:
    if previous is None:
        raise DataError(
            f"--pinned keeps the dataset that was used before, but storage has no dataset of "
            f"{json.dumps(source.description())} with the classes that spec.dataset.classes selects. Run the job "
            "without --pinned."
        )
    metadata = previous.dataset.metadata
    if metadata.pull_format != FORMAT:
        raise DataError(
            f"--pinned would use {previous.dataset.prefix}, which another version of topwork pulled with other rules. "
            "Run the job without --pinned."
        )
    return SelectedDataset(metadata.fingerprint, previous.dataset, is_pinned=True)


def read_stored_dataset(storage: Storage, prefix: str) -> StoredDataset | None:
    """Read the metadata of a stored dataset; None if there is none or it is incomplete."""
    metadata = read_dataset_metadata(storage, prefix)
    return StoredDataset(prefix, metadata) if metadata else None


def find_previous_dataset(job: TransferJob, source: Source, storage: Storage) -> PreviousDataset | None:
    """Find the dataset of the latest version of the job's model, otherwise the newest one of the same source.

    Datasets with another selection of classes are not considered: a model of other classes would be trained on them.

    Args:
        job: The job.
        source: Its source.
        storage: Storage of the job.

    Returns:
        The dataset; None if storage has none of this source.
    """
    latest = versions.read_latest(storage, job.model_name)
    origin = source.description()
    classes = pull_settings(job.spec.dataset).get("classes")
    datasets = [
        stored
        for stored in list_datasets(storage, source.name)
        if stored.metadata.source == origin and stored.metadata.class_setting == classes
    ]
    for dataset in datasets:
        if latest and latest.dataset == dataset.prefix:
            return PreviousDataset(dataset, f"version {latest.version}")
    return PreviousDataset(datasets[-1], "the last pull") if datasets else None


def list_datasets(storage: Storage, name: str = "") -> list[StoredDataset]:
    """List the complete datasets in storage, the newest last.

    Args:
        storage: Storage of the datasets.
        name: Name of the datasets; empty for all.

    Returns:
        The datasets, except damaged ones and those of a newer topwork.
    """
    prefix = f"{DATASETS_PREFIX}/{name}/" if name else f"{DATASETS_PREFIX}/"
    manifests = [stored for stored in storage.list(prefix) if stored.key.endswith("/manifest.json")]
    datasets = []
    for manifest in sorted(manifests, key=lambda stored: stored.modified):
        try:
            dataset = read_stored_dataset(storage, manifest.key.rpartition("/")[0])
        except DataError:
            continue
        if dataset:
            datasets.append(dataset)
    return datasets


def write_entries(entries: Iterable[SourceEntry], directory: Path) -> None:
    """Write the listing of a source into the directory of a dataset. The same entries give the same bytes."""
    with (
        (directory / ENTRIES_FILE).open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as compressed,
        io.TextIOWrapper(compressed, "utf-8", newline="") as text,
    ):
        writer = csv.writer(text)
        for entry in entries:
            row = (entry.path, entry.label or "", "" if entry.size is None else entry.size, entry.version or "")
            writer.writerow((*row, entry.split, entry.group) if entry.split or entry.group else row)


def read_entries(dataset: StoredDataset, storage: Storage) -> list[SourceEntry] | None:
    """Read the listing of the source that a dataset was pulled from; None if it was not stored."""
    data = storage.read(f"{dataset.prefix}/{ENTRIES_FILE}")
    if data is None:
        return None
    rows: Iterator[list[str]] = csv.reader(io.StringIO(gzip.decompress(data).decode(), newline=""))
    return [
        SourceEntry(path, label or None, int(size) if size else None, version or None, *others)
        for path, label, size, version, *others in rows
    ]
