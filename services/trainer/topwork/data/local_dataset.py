"""A stored dataset on scratch, ready to train: chosen splits with random access to resized images."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from topwork.artifacts import fetch_whole
from topwork.data.dataset_manifest import StoredDataset
from topwork.data.decode_pool import usable_cores
from topwork.data.decoding import decode, resize
from topwork.data.record_index import Records, open_records
from topwork.data.splits import NAMES, Examples, choose, missing_classes
from topwork.spec import TransferJob
from topwork.spec.compute import in_bytes
from topwork.workspace import Workspace

_PIXELS = "pixels-1"
"""Name and version of the files of resized images: another version where resizing gives other values."""

_SHARE = 0.8
"""Part of the free scratch that resized images may take."""

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


class Split:
    """The images of one split, in a fixed order.

    Attributes:
        size: Images.
        labels: int64 (size,), values 0 … classes-1.
        image_size: Height and width in pixels.
        views: Kept views of each image; the place of image i in view v is v * size + i.
    """

    views = 1

    def __init__(self, records: Records, positions: Indices, image_size: tuple[int, int]) -> None:
        self.size = len(positions)
        self.labels: npt.NDArray[np.int64] = records.labels[positions]
        self.image_size = image_size
        self._records = records
        self._positions = positions
        self._pixels: Pixels | None = None

    @cached_property
    def names(self) -> Sequence[str]:
        """Origin of each image, as its source called it."""
        return self._records.names_of(self._positions)

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """First 8 bytes of the digest of each image's pixels, uint64 (size,): equal for equal pictures."""
        digests: npt.NDArray[np.uint64] = self._records.digests[self._positions]
        return digests

    def encoded(self, index: int) -> bytes:
        """Give the stored file of one image.

        Args:
            index: 0 … size-1.

        Returns:
            JPEG or PNG file.
        """
        return self._records.encoded(int(self._positions[index]))

    def images(self, indices: Indices) -> Pixels:
        """Give resized images.

        Args:
            indices: int64 (n,), each 0 … size-1, in any order.

        Returns:
            uint8 (n, height, width, 3).
        """
        if self._pixels is not None:
            return np.take(self._pixels, indices, axis=0)
        resized = [resize(decode(self.encoded(index)), self.image_size).numpy().astype(np.uint8) for index in indices]
        return np.stack(resized) if resized else np.zeros((0, *self.image_size, 3), np.uint8)

    def gather(self, indices: tf.Tensor) -> tf.Tensor:
        """Give resized images inside tf.data.

        Args:
            indices: int64 (n,), each 0 … size-1, in any order.

        Returns:
            float32 (n, height, width, 3), values 0..255.
        """
        if self._pixels is not None:
            pixels = tf.numpy_function(self.images, [indices], tf.uint8, stateful=False)
            images = tf.cast(pixels, tf.float32)
        else:
            # Decoding stays in the graph: no TensorFlow runs inside Python here, which could wait for its own threads.
            files = tf.numpy_function(self._files, [indices], tf.string, stateful=False)
            images = tf.map_fn(
                lambda file: resize(decode(file), self.image_size),
                tf.ensure_shape(files, indices.shape),
                fn_output_signature=tf.float32,
            )
        return tf.ensure_shape(images, (*indices.shape, *self.image_size, 3))

    def _files(self, indices: Indices) -> npt.NDArray[np.object_]:
        return np.array([self.encoded(index) for index in indices], dtype=object)

    def keep_resized(self, folder: Path, workspace: Workspace) -> None:
        """Decode and resize every image once into one file, which an earlier stage may have written.

        Args:
            folder: Scratch of the dataset.
            workspace: For its progress.
        """
        content = hashlib.sha256(repr(self.image_size).encode() + self._positions.tobytes()).hexdigest()[:16]
        path = folder / f"{_PIXELS}-{content}.u8"
        shape = (self.size, *self.image_size, 3)
        if not (path.exists() and path.stat().st_size == int(np.prod(shape))):
            self._write_resized(path, workspace)
        self._pixels = np.memmap(path, np.uint8, "r", shape=shape).view(np.ndarray)

    def _write_resized(self, path: Path, workspace: Workspace) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        dataset = tf.data.Dataset.range(self.size).map(
            lambda index: tf.cast(self.gather(index[tf.newaxis])[0], tf.uint8),
            num_parallel_calls=usable_cores(),
            deterministic=True,
        )
        with workspace.track("images: decode", self.size) as tracker, part.open("wb") as file:
            for some in fixed(dataset.batch(16).prefetch(2)).as_numpy_iterator():
                file.write(some.tobytes())
                tracker.advance(len(some))
        part.replace(path)


@dataclass(frozen=True)
class LocalDataset:
    """The chosen splits of a dataset, on scratch.

    Attributes:
        class_names: Classes, in the order of their labels.
        train: What is learned from.
        validation: What is watched while learning; None where the spec names none.
        test: What the result is evaluated on; None where the spec names none.
    """

    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split | None


def fetch(dataset: StoredDataset, job: TransferJob, workspace: Workspace) -> LocalDataset:
    """Bring a stored dataset to scratch, checked against its manifest, and choose the splits of the job.

    Images are decoded and resized once into a file on scratch where that has room for them, and on the fly otherwise.
    What an earlier stage left on scratch is used again.

    Args:
        dataset: The stored dataset.
        job: The job, for its splits, image size and seed.
        workspace: Storage, progress and scratch.

    Returns:
        The splits.

    Raises:
        DataError: If the splits can't be filled.
        UnavailableError: If storage can't be reached, or a file is not what the manifest says.
    """
    spec, facts = job.spec.dataset, dataset.facts
    folder = workspace.scratch / dataset.prefix
    fetch_whole(workspace.storage, dataset.prefix, folder)
    records = open_records(folder, list(facts.splits))
    sources = {
        name: Examples(first, records.labels[first : first + size]) for name, (first, size) in records.splits.items()
    }
    chosen = choose(spec, sources, facts.class_names, job.spec.seed)
    splits = {name: Split(records, positions, spec.image_size) for name, positions in chosen.items()}
    if _has_room(workspace.scratch, sum(_bytes_of(split) for split in splits.values()), job):
        for split in splits.values():
            split.keep_resized(folder, workspace)
    _note_once(folder / "noted", splits, facts.class_names, workspace)
    return LocalDataset(facts.class_names, *(splits.get(name) for name in NAMES))  # type: ignore[arg-type]


def fixed(dataset: Any) -> Any:
    """Turn tf.data's autotuner off: it can hold up the end of an iteration until its next tick.

    Args:
        dataset: A tf.data.Dataset with its parallelism given.

    Returns:
        The same dataset with that option.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _bytes_of(split: Split) -> int:
    return split.size * split.image_size[0] * split.image_size[1] * 3


def _has_room(scratch: Path, needed: int, job: TransferJob) -> bool:
    """Say whether resized images fit: on the disk, and in the scratch volume, whose limit ends the pod."""
    return needed <= _SHARE * min(shutil.disk_usage(scratch).free, in_bytes(job.spec.compute.scratch) / 2)


def _note_once(mark: Path, splits: dict[str, Split], class_names: tuple[str, ...], workspace: Workspace) -> None:
    """Tell what is odd about the splits, in the first of the stages only."""
    if mark.exists():
        return
    workspace.progress.note("splits", **{name: split.size for name, split in splits.items()})
    for one, other in combinations(splits, 2):
        common = int(np.isin(splits[other].digests, splits[one].digests).sum())
        if common:
            workspace.progress.note("duplicates across splits", images=common, of=other, also_in=one)
    for name, split in splits.items():
        if missing := missing_classes(split.labels, class_names):
            workspace.progress.note("classes without an image", split=name, classes=missing)
    mark.touch()
