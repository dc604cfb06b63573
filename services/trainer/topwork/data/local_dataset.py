"""Local copy of a stored dataset: the splits of a job, with random access to resized images."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import tensorflow as tf

from topwork.artifacts import download_artifact
from topwork.data.dataset_manifest import ENTRIES_FILE, DatasetMetadata, StoredDataset
from topwork.data.images.decode_pool import available_cpus
from topwork.data.images.decoding import Preprocessing
from topwork.data.images.image_validation import SEVERAL_FRAMES
from topwork.data.images.value_range import ValueRange, describe_value_range, resolve_value_range
from topwork.data.record_index import RecordIndex, open_record_index
from topwork.data.splits.groups import find_groups
from topwork.data.splits.inputs import SplitInputs
from topwork.data.splits.lists import find_unavailable_images
from topwork.data.splits.selection import Selection, SourceSplit, StoredImages, format_missing_classes, select_images
from topwork.spec import TransferJob
from topwork.spec.dataset import Dataset
from topwork.spec.kubernetes_types import quantity_to_bytes
from topwork.spec.messages import count_noun
from topwork.spec.splits import SPLIT_NAMES
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

_PIXEL_CACHE = "pixels-3"
"""File name prefix of cached resized images. Increment the number when `Preprocessing` changes its results, or when
the order of the images in the file changes."""

_PIXEL_CACHE_MAX_SHARE = 0.8
"""Maximum share of the free scratch space for cached resized images."""

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


class Split:
    """The images of one split, in a fixed order.

    Attributes:
        size: Number of images.
        labels: int64 (size,), values 0..classes-1.
        image_size: Height and width in pixels.
        preprocessing: How the stored files are decoded and resized.
        views: Number of cached views per image. Row v * size + i is view v of image i.
    """

    views = 1

    def __init__(
        self,
        records: RecordIndex,
        positions: Indices,
        image_size: tuple[int, int],
        preprocessing: Preprocessing,
    ) -> None:
        """Select images by their positions among all stored examples, int64 (size,)."""
        self.size = len(positions)
        self.labels: npt.NDArray[np.int64] = records.labels[positions]
        self.image_size = image_size
        self.preprocessing = preprocessing
        self._records = records
        self._positions = positions
        self._pixels: Pixels | None = None
        self._rows = positions

    @cached_property
    def names(self) -> Sequence[str]:
        """Name of each image, as in the source."""
        return self._records.image_names(self._positions)

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """First 8 bytes of the pixel digest of each image, uint64 (size,). Identical images have equal digests."""
        digests: npt.NDArray[np.uint64] = self._records.digests[self._positions]
        return digests

    def resized(self, image_size: tuple[int, int], preprocessing: Preprocessing) -> "Split":
        """Return the same images in another size and preprocessing; they are decoded each time they are used."""
        if (image_size, preprocessing) == (self.image_size, self.preprocessing):
            return self
        return Split(self._records, self._positions, image_size, preprocessing)

    def subset(self, indices: Indices) -> "Split":
        """Return some of the images, by their indices in ascending order; they are decoded each time they are used."""
        return Split(self._records, self._positions[indices], self.image_size, self.preprocessing)

    def merged(self, others: Sequence["Split"]) -> "Split":
        """Return the images of this split and other splits of the same dataset, each once, in stored order."""
        positions = np.unique(np.concatenate([split._positions for split in (self, *others)]))
        return Split(self._records, positions, self.image_size, self.preprocessing)

    def load_encoded(self, index: int) -> bytes:
        """Load the stored file of one image.

        Args:
            index: 0..size-1.

        Returns:
            Bytes of a JPEG or PNG file.
        """
        return self._records.read_image(int(self._positions[index]))

    def load_images(self, indices: Indices) -> Pixels:
        """Load resized images.

        Args:
            indices: int64 (n,), values 0..size-1, in any order.

        Returns:
            uint8 (n, height, width, 3).

        Example:
            >>> dataset.test.load_images(np.arange(10)).shape
            (10, 224, 224, 3)
        """
        if self._pixels is not None:
            return np.take(self._pixels, self._rows[indices], axis=0)
        resized = [
            self.preprocessing.load(self.load_encoded(index), self.image_size).numpy().astype(np.uint8)
            for index in indices
        ]
        return np.stack(resized) if resized else np.zeros((0, *self.image_size, 3), np.uint8)

    def gather(self, indices: tf.Tensor) -> tf.Tensor:
        """Load resized images inside a tf.data pipeline.

        Args:
            indices: int64 (n,), values 0..size-1, in any order.

        Returns:
            float32 (n, height, width, 3), values 0..255.
        """
        if self._pixels is not None:
            pixels = tf.numpy_function(self.load_images, [indices], tf.uint8, stateful=False)
            images = tf.cast(pixels, tf.float32)
        else:
            # Decode in the graph. TensorFlow ops inside numpy_function could deadlock on TensorFlow's own threads.
            files = tf.numpy_function(self._load_files, [indices], tf.string, stateful=False)
            images = tf.map_fn(
                lambda file: self.preprocessing.load(file, self.image_size),
                tf.ensure_shape(files, indices.shape),
                fn_output_signature=tf.float32,
            )
        return tf.ensure_shape(images, (*indices.shape, *self.image_size, 3))

    def _load_files(self, indices: Indices) -> npt.NDArray[np.object_]:
        return np.array([self.load_encoded(index) for index in indices], dtype=object)

    def use_cached_pixels(self, images: "Split", directory: Path) -> None:
        """Use the file with the resized images of a split that contains these; see `cache_pixels`."""
        shape = (images.size, *images.image_size, 3)
        self._pixels = np.memmap(images.pixel_file(directory), np.uint8, "r", shape=shape).view(np.ndarray)
        self._rows = np.searchsorted(images._positions, self._positions)

    def has_cached_pixels(self, directory: Path) -> bool:
        """Return whether an earlier stage or attempt has written all resized images to the directory."""
        path = self.pixel_file(directory)
        return path.exists() and path.stat().st_size == _pixel_bytes(self)

    def pixel_file(self, directory: Path) -> Path:
        """Return the path of the file of all resized images."""
        settings = f"{self.image_size}{self.preprocessing}".encode()
        content = hashlib.sha256(settings + self._positions.tobytes()).hexdigest()[:16]
        return directory / f"{_PIXEL_CACHE}-{content}.u8"

    def decode_all(self) -> Iterator[Pixels]:
        """Decode and resize every image once, in parallel, as uint8 (height, width, 3)."""

        def load_image(index: tf.Tensor) -> tf.Tensor:
            file = tf.ensure_shape(tf.numpy_function(self.load_encoded, [index], tf.string, stateful=False), ())
            return tf.cast(self.preprocessing.load(file, self.image_size), tf.uint8)

        images = tf.data.Dataset.range(self.size).map(
            load_image, num_parallel_calls=available_cpus(), deterministic=True
        )
        for batch in disable_autotune(images.batch(16).prefetch(2)).as_numpy_iterator():
            yield from batch


@dataclass(frozen=True)
class LocalDataset:
    """The splits of a job, on scratch.

    Attributes:
        class_names: Class names, in label order.
        train: Training images.
        validation: Validation images, or None if the spec has no validation split.
        test: Test images, or None if the spec has no test split.
        notes: What is not obvious about the splits, in sentences for the report.
        records: Index of all stored images.
    """

    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split | None
    notes: tuple[str, ...] = ()
    records: RecordIndex | None = None

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that the spec defines, by name."""
        found = zip(SPLIT_NAMES, (self.train, self.validation, self.test), strict=True)
        return {name: split for name, split in found if split is not None and split.size}


def fetch_dataset(
    dataset: StoredDataset, job: TransferJob, workspace: Workspace, *, decode: bool = True
) -> LocalDataset:
    """Download a stored dataset to scratch, verify it against its manifest, and select the splits of a job.

    Images are decoded and resized once into files on scratch if these fit, otherwise each time they are used. Files
    that an earlier stage left on scratch are reused.

    Args:
        dataset: The stored dataset.
        job: The job, for its splits, image size and seed.
        workspace: Storage, progress and scratch.
        decode: Whether to decode the images of all splits in advance. A command that uses only some of them does not.

    Returns:
        The splits.

    Raises:
        DataError: If the splits can't be filled.
        UnavailableError: If storage can't be reached, or a file does not match the manifest.

    Example:
        >>> dataset = fetch_dataset(pull(job, workspace), job, workspace)
        >>> dataset.train.size
        1000
    """
    spec, metadata = job.spec.dataset, dataset.metadata
    directory = workspace.scratch / dataset.prefix
    download_artifact(workspace.storage, dataset.prefix, directory)
    records = open_record_index(directory, list(metadata.splits))
    images = _describe_images(records, dataset, directory, spec)
    selected = select_images(spec, metadata, images, dataset.inputs or SplitInputs(), job.spec.seed)
    preprocessing = Preprocessing(resolve_value_range(spec.value_range, metadata.values), spec.image_fit)
    splits = {
        name: Split(records, positions, spec.image_size, preprocessing)
        for name, positions in selected.positions.items()
    }
    if spec.audit.near_duplicates == "off":
        selected = replace(selected, notes=(*selected.notes, *_describe_duplicates(splits)))
    _delete_incomplete_pixels(directory)
    if decode and _fits_on_scratch(list(splits.values()), directory, job):
        cache_pixels(list(splits.values()), directory, workspace)
    marker = directory / f"splits-logged-{spec.fold or 'all'}"
    _log_splits_once(marker, selected, splits, metadata, preprocessing.value_range)
    validation, test = splits.get("validation"), splits.get("test")
    return LocalDataset(metadata.class_names, splits["train"], validation, test, selected.notes, records)


def _describe_images(records: RecordIndex, dataset: StoredDataset, directory: Path, spec: Dataset) -> StoredImages:
    """Collect what the selection of the splits needs; names are read only if it needs them."""
    metadata, listing = dataset.metadata, directory / ENTRIES_FILE
    sources = {
        name: SourceSplit(first, records.labels[first : first + size]) for name, (first, size) in records.splits.items()
    }
    splits = spec.split_settings
    needs_names = splits.group_by or splits.lists or splits.pin_test
    names = records.image_names(np.arange(len(records.labels))) if needs_names else []
    return StoredImages(
        metadata.class_names,
        sources,
        names,
        records.digests,
        find_groups(spec.group_by, names, metadata.source_class_names, listing) if spec.group_by else None,
        find_unavailable_images(names, metadata, listing) if splits.lists else {},
    )


def cache_pixels(splits: Sequence[Split], directory: Path, workspace: Workspace) -> None:
    """Decode and resize the images of all splits into one file, or open the file if an earlier stage has written it.

    The file does not depend on how the images are divided among the splits: the folds of cross-validation share it.

    Args:
        splits: Splits of the same dataset, with the same image size and preprocessing.
        directory: Directory of the dataset on scratch.
        workspace: Workspace that displays the progress.
    """
    images = splits[0].merged(splits[1:])
    if not images.has_cached_pixels(directory):
        path = images.pixel_file(directory)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with workspace.track("images: decode", images.size) as tracker, part.open("wb") as file:
            for image in images.decode_all():
                file.write(image.tobytes())
                tracker.advance(1)
        part.replace(path)
    for split in splits:
        split.use_cached_pixels(images, directory)


def disable_autotune(dataset: Any) -> Any:
    """Disable tf.data's autotuner, which can delay the end of an iteration until its next period.

    Args:
        dataset: A tf.data.Dataset with explicit parallelism.

    Returns:
        The dataset with autotuning disabled.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _pixel_bytes(split: Split) -> int:
    return split.size * split.image_size[0] * split.image_size[1] * 3


def _delete_incomplete_pixels(directory: Path) -> None:
    """Delete files that killed processes of this run left behind; no other process uses its scratch directory."""
    for path in directory.glob(f"{_PIXEL_CACHE}-*.part"):
        path.unlink()


def _fits_on_scratch(splits: Sequence[Split], directory: Path, job: TransferJob) -> bool:
    """Check the free disk space and the size limit of the scratch volume. A pod that exceeds the limit is evicted.

    Files that exist already are not written again, so every stage of a run gets the same answer.
    """
    images = splits[0].merged(splits[1:])
    needed = _pixel_bytes(images)
    existing = needed if images.has_cached_pixels(directory) else 0
    available = min(shutil.disk_usage(directory).free + existing, quantity_to_bytes(job.spec.compute.scratch) / 2)
    return needed <= _PIXEL_CACHE_MAX_SHARE * available


def _log_splits_once(
    marker: Path,
    selected: Selection,
    splits: dict[str, Split],
    metadata: DatasetMetadata,
    value_range: ValueRange,
) -> None:
    """Log what the splits contain and how images are decoded, only in the first stage that uses this directory."""
    if marker.exists():
        return
    log.info("splits", **{name: split.size for name, split in splits.items()})
    for note in selected.notes:
        log.warning("splits", note=note)
    for name, split in splits.items():
        if missing := format_missing_classes(split.labels, metadata.class_names):
            log.warning("classes without images", split=name, classes=missing)
    _log_conversions(metadata, value_range)
    marker.touch()


def _describe_duplicates(splits: dict[str, Split]) -> tuple[str, ...]:
    """Count images of a split with the pixels of an image of another split; sentences for the log and the report."""
    notes = []
    for first, second in combinations(splits, 2):
        if common := int(np.isin(splits[second].digests, splits[first].digests).sum()):
            what, has = count_noun(common, "image"), "has" if common == 1 else "have"
            notes.append(
                f"{what} of the {second} split {has} the same pixels as an image of the {first} split, so the metrics "
                "are optimistic."
            )
    return tuple(notes)


def _log_conversions(metadata: DatasetMetadata, value_range: ValueRange) -> None:
    if metadata.values:
        description, *warnings = describe_value_range(value_range, metadata.values)
        log.info("value range", low=value_range[0], high=value_range[1], description=description)
        for warning in warnings:
            log.warning("value range", problem=warning)
    if frames := sum(count for kind, count in metadata.kinds.items() if kind.endswith(SEVERAL_FRAMES)):
        log.warning("only the first page or frame is used", images=frames)
