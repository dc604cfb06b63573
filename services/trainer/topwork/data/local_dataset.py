"""Local copy of a stored dataset: the splits of a job, with random access to resized images."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import tensorflow as tf

from topwork.artifacts import download_artifact
from topwork.data.dataset_manifest import ENTRIES_FILE, DatasetMetadata, StoredDataset
from topwork.data.groups import find_groups
from topwork.data.images.decode_pool import available_cpus
from topwork.data.images.decoding import decode, resize
from topwork.data.images.image_validation import SEVERAL_FRAMES
from topwork.data.images.value_range import FULL_RANGE, ValueRange, describe_value_range, resolve_value_range
from topwork.data.record_index import RecordIndex, open_record_index
from topwork.data.splits import SourceSplit, describe_splits, format_missing_classes, select_splits
from topwork.spec import TransferJob
from topwork.spec.dataset import Dataset
from topwork.spec.kubernetes_types import quantity_to_bytes
from topwork.spec.splits import SPLIT_NAMES
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

_PIXEL_CACHE = "pixels-2"
"""File name prefix of cached resized images. Increment the number when `decode` or `resize` changes its results."""

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
        value_range: Values that become 0 and 255 in images with more than 8 bits per channel.
        views: Number of cached views per image. Row v * size + i is view v of image i.
    """

    views = 1

    def __init__(
        self,
        records: RecordIndex,
        positions: Indices,
        image_size: tuple[int, int],
        value_range: ValueRange = FULL_RANGE,
    ) -> None:
        """Select images by their positions among all stored examples, int64 (size,)."""
        self.size = len(positions)
        self.labels: npt.NDArray[np.int64] = records.labels[positions]
        self.image_size = image_size
        self.value_range = value_range
        self._records = records
        self._positions = positions
        self._pixels: Pixels | None = None

    @cached_property
    def names(self) -> Sequence[str]:
        """Name of each image, as in the source."""
        return self._records.image_names(self._positions)

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """First 8 bytes of the pixel digest of each image, uint64 (size,). Identical images have equal digests."""
        digests: npt.NDArray[np.uint64] = self._records.digests[self._positions]
        return digests

    def resized(self, image_size: tuple[int, int], value_range: ValueRange | None = None) -> "Split":
        """Return the same images in another size and value range; they are decoded each time they are used."""
        value_range = value_range or self.value_range
        if (image_size, value_range) == (self.image_size, self.value_range):
            return self
        return Split(self._records, self._positions, image_size, value_range)

    def extended(self, others: Sequence["Split"]) -> "Split":
        """Return the images of this split, followed by those of other splits of the same dataset."""
        positions = np.concatenate([split._positions for split in (self, *others)])
        return Split(self._records, positions, self.image_size, self.value_range)

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
            return np.take(self._pixels, indices, axis=0)
        resized = [
            resize(decode(self.load_encoded(index), self.value_range), self.image_size).numpy().astype(np.uint8)
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
                lambda file: resize(decode(file, self.value_range), self.image_size),
                tf.ensure_shape(files, indices.shape),
                fn_output_signature=tf.float32,
            )
        return tf.ensure_shape(images, (*indices.shape, *self.image_size, 3))

    def _load_files(self, indices: Indices) -> npt.NDArray[np.object_]:
        return np.array([self.load_encoded(index) for index in indices], dtype=object)

    def use_cached_pixels(self, directory: Path) -> None:
        """Open the file of all resized images in the directory of the dataset on scratch; see `cache_pixels`."""
        shape = (self.size, *self.image_size, 3)
        self._pixels = np.memmap(self.pixel_file(directory), np.uint8, "r", shape=shape).view(np.ndarray)

    def has_cached_pixels(self, directory: Path) -> bool:
        """Return whether an earlier stage or attempt has written all resized images to the directory."""
        path = self.pixel_file(directory)
        return path.exists() and path.stat().st_size == _pixel_bytes(self)

    def pixel_file(self, directory: Path) -> Path:
        """Return the path of the file of all resized images."""
        settings = f"{self.image_size}{self.value_range}".encode()
        content = hashlib.sha256(settings + self._positions.tobytes()).hexdigest()[:16]
        return directory / f"{_PIXEL_CACHE}-{content}.u8"

    def decode_all(self) -> Iterator[Pixels]:
        """Decode and resize every image once, in parallel, as uint8 (height, width, 3)."""

        def load_image(index: tf.Tensor) -> tf.Tensor:
            file = tf.ensure_shape(tf.numpy_function(self.load_encoded, [index], tf.string, stateful=False), ())
            pixels = tf.cast(resize(decode(file, self.value_range), self.image_size), tf.uint8)
            return tf.ensure_shape(pixels, (*self.image_size, 3))

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
        records: Index of all stored images.
    """

    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split | None
    records: RecordIndex | None = None

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that the spec defines, by name."""
        found = zip(SPLIT_NAMES, (self.train, self.validation, self.test), strict=True)
        return {name: split for name, split in found if split is not None and split.size}


def fetch_dataset(dataset: StoredDataset, job: TransferJob, workspace: Workspace) -> LocalDataset:
    """Download a stored dataset to scratch, verify it against its manifest, and select the splits of a job.

    Images are decoded and resized once into files on scratch if these fit, otherwise each time they are used. Files
    that an earlier stage left on scratch are reused.

    Args:
        dataset: The stored dataset.
        job: The job, for its splits, image size and seed.
        workspace: Storage, progress and scratch.

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
    sources = {
        name: SourceSplit(first, records.labels[first : first + size]) for name, (first, size) in records.splits.items()
    }
    groups = None
    if spec.group_by:
        names = records.image_names(np.arange(len(records.labels)))
        groups = find_groups(spec.group_by, names, metadata.class_names, directory / ENTRIES_FILE)
    selected = select_splits(spec, sources, metadata.class_names, job.spec.seed, groups)
    value_range = resolve_value_range(spec.value_range, metadata.values)
    splits = {name: Split(records, positions, spec.image_size, value_range) for name, positions in selected.items()}
    _delete_incomplete_pixels(directory)
    if _fits_on_scratch(list(splits.values()), directory, job):
        cache_pixels(list(splits.values()), directory, workspace)
    _log_splits_once(directory / "splits-logged", spec, splits, metadata, value_range)
    return LocalDataset(metadata.class_names, splits["train"], splits.get("validation"), splits.get("test"), records)


def cache_pixels(splits: Sequence[Split], directory: Path, workspace: Workspace) -> None:
    """Decode and resize the images of each split into one file, or open the file if an earlier stage has written it.

    Args:
        splits: Splits of the same dataset, with the same image size and value range.
        directory: Directory of the dataset on scratch.
        workspace: Workspace that displays the progress.
    """
    missing = [split for split in splits if not split.has_cached_pixels(directory)]
    if missing:
        # One pass over the images of all splits: to load the graph for each split takes most of a second.
        images = missing[0].extended(missing[1:]).decode_all()
        with workspace.track("images: decode", sum(split.size for split in missing)) as tracker:
            for split in missing:
                path = split.pixel_file(directory)
                part = path.with_name(f"{path.name}.{os.getpid()}.part")
                with part.open("wb") as file:
                    for image in islice(images, split.size):
                        file.write(image.tobytes())
                        tracker.advance(1)
                part.replace(path)
    for split in splits:
        split.use_cached_pixels(directory)


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
    needed = sum(map(_pixel_bytes, splits))
    existing = sum(_pixel_bytes(split) for split in splits if split.has_cached_pixels(directory))
    available = min(shutil.disk_usage(directory).free + existing, quantity_to_bytes(job.spec.compute.scratch) / 2)
    return needed <= _PIXEL_CACHE_MAX_SHARE * available


def _log_splits_once(
    marker: Path, spec: Dataset, splits: dict[str, Split], metadata: DatasetMetadata, value_range: ValueRange
) -> None:
    """Log what the splits contain and how images are decoded, only in the first stage that uses this directory."""
    if marker.exists():
        return
    log.info("splits", **{name: split.size for name, split in splits.items()})
    # The audit also finds near duplicates.
    for first, second in combinations(splits, 2) if spec.audit.near_duplicates == "off" else ():
        common = int(np.isin(splits[second].digests, splits[first].digests).sum())
        if common:
            log.warning("duplicates across splits", images=common, split=second, other_split=first)
    for note in describe_splits(spec, metadata):
        log.warning("predefined splits", note=note)
    for name, split in splits.items():
        if missing := format_missing_classes(split.labels, metadata.class_names):
            log.warning("classes without images", split=name, classes=missing)
    _log_conversions(metadata, value_range)
    marker.touch()


def _log_conversions(metadata: DatasetMetadata, value_range: ValueRange) -> None:
    if metadata.values:
        description, *warnings = describe_value_range(value_range, metadata.values)
        log.info("value range", low=value_range[0], high=value_range[1], description=description)
        for warning in warnings:
            log.warning("value range", problem=warning)
    if frames := sum(count for kind, count in metadata.kinds.items() if kind.endswith(SEVERAL_FRAMES)):
        log.warning("only the first page or frame is used", images=frames)
