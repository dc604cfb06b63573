"""What the frozen half of a classifier gives, computed once for each view of an image instead of once an epoch."""

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from topwork.data.batches import view_batches
from topwork.data.local_dataset import Indices, LocalDataset, Split
from topwork.errors import SettingError, Stopped
from topwork.model.augmentation import Augment
from topwork.model.freezing import digest
from topwork.model.partition import Halves
from topwork.registry.stage_results import stage_prefix
from topwork.spec import TransferJob
from topwork.training.feature_cache.extractor import Extraction
from topwork.training.feature_cache.files import MOST_BYTES, FeatureFiles
from topwork.training.feature_cache.placement import Place, place_for
from topwork.training.plan import Plan
from topwork.workspace import Workspace

# float16 keeps three digits of what lies in this range; other features are kept in float32.
HALF_RANGE = (1e-3, 1e4)
# Images of one piece in storage: no more than these are computed again after a stop.
PIECE_IMAGES = 1024

Array = npt.NDArray[Any]


class FeatureSplit(Split):
    """Features in the place of images, a view or several of each."""

    def __init__(self, values: Array, split: Split) -> None:
        """Take features.

        Args:
            values: float16 or float32 (views * images, *features), one view of all images after another.
            split: The images that they were computed of.
        """
        self.size = split.size
        self.labels = split.labels
        self.views = len(values) // split.size
        self._values = values
        self._images = split

    @cached_property
    def names(self) -> Sequence[str]:
        """Origin of each image, as its source called it."""
        return self._images.names

    def gather(self, indices: tf.Tensor) -> tf.Tensor:
        """Give features inside tf.data.

        Args:
            indices: int64 (n,), each a place: view * size + image.

        Returns:
            float32 (n, *features).
        """

        def take(chosen: Indices) -> npt.NDArray[np.float32]:
            return np.take(self._values, chosen, axis=0).astype(np.float32)

        features = tf.numpy_function(take, [indices], tf.float32, stateful=False)
        return tf.ensure_shape(features, (*indices.shape, *self._values.shape[1:]))


@dataclass(frozen=True)
class _Part:
    """A split whose features are computed."""

    name: str
    split: Split
    views: int
    augment: Augment | None


@dataclass(frozen=True)
class FeatureJob:
    """What features depend on, and who computes them.

    Attributes:
        job: The job.
        plan: The stage.
        data: Its images.
        halves: The classifier; features are what its lower half gives.
        augment: Changes of the training images.
        workspace: Storage, scratch, progress and the sign to stop.
    """

    job: TransferJob
    plan: Plan
    data: LocalDataset
    halves: Halves
    augment: Augment | None
    workspace: Workspace

    @property
    def images(self) -> int:
        """Images that the lower half runs over, each view counted."""
        return sum(part.split.size * part.views for part in self.parts)

    @property
    def parts(self) -> tuple[_Part, ...]:
        """The training images in their views, and the validation images as they are."""
        train = _Part("train", self.data.train, self.plan.caching.views, self.augment)
        if self.data.validation is None or not self.data.validation.size:
            return (train,)
        return train, _Part("validation", self.data.validation, 1, None)

    @property
    def prefix(self) -> str:
        """Key in storage that stands for all that the features depend on."""
        facts = (
            digest(self.halves.lower.variables),
            self.plan.seed,
            self.plan.caching.views,
            self.halves.feature_shape,
        )
        content = hashlib.sha256(repr((*facts, self.job.spec.compute.precision)).encode())
        for part in self.parts:
            content.update(part.split.digests.tobytes())
        return f"{features_prefix(self.job, self.plan)}/{content.hexdigest()[:16]}"


def features_prefix(job: TransferJob, plan: Plan) -> str:
    """Key of all features that a stage keeps in storage while it runs."""
    return f"{stage_prefix(job.run, plan.stage)}/features"


def computed(work: FeatureJob) -> LocalDataset | None:
    """Run the frozen half over the training views and the validation images.

    Pieces that an earlier process stored are taken from there.

    Args:
        work: What is to be computed.

    Returns:
        The same splits as features; the test split is None. None where they have no room, and weren't asked for.

    Raises:
        SettingError: If they were asked for and have no room.
        Stopped: If asked to stop; what is stored is not computed again.
    """
    began = time.monotonic()
    extraction = Extraction(
        work.halves.lower,
        precision=work.job.spec.compute.precision,
        images=work.images,
        progress=work.workspace.progress,
    )
    dtype = _dtype(work, extraction)
    needed = dtype.itemsize * prod(work.halves.feature_shape) * work.images
    place = place_for(needed, work.workspace.scratch, work.job)
    if place is None:
        _tell_without_room(work, needed)
        return None
    splits = {}
    for part in work.parts:
        shape = (part.split.size * part.views, *work.halves.feature_shape)
        values = _room(work, part.name, shape, dtype, place)
        with _files(work, part, needed) as files:
            _Filling(work, extraction, part, files).fill(values)
        splits[part.name] = FeatureSplit(values, part.split)
    work.workspace.progress.note(
        "features of the frozen layers",
        stage=work.plan.stage,
        views=work.plan.caching.views,
        shape="x".join(map(str, work.halves.feature_shape)),
        kept_in=place,
        mebibytes=needed / 2**20,
        seconds=time.monotonic() - began,
    )
    return LocalDataset(work.data.class_names, splits["train"], splits.get("validation"), None)


class _Filling:
    """Fills the features of one split, batch by batch."""

    def __init__(self, work: FeatureJob, extraction: Extraction, part: _Part, files: FeatureFiles | None) -> None:
        self._work, self._extraction, self._part, self._files = work, extraction, part, files
        self._batch_size = work.plan.batch_size
        self._batches_a_view = -(-part.split.size // self._batch_size)

    def fill(self, values: Array) -> None:
        """Take what is stored, and compute the rest.

        Args:
            values: (views * images, *features), to be filled.
        """
        row = stored = self._take(values)
        first = self._number_of(row)
        total = self._batches_a_view * self._part.views
        with self._work.workspace.track(f"features: {self._part.name}", total - first) as tracker:
            for number, images in zip(range(first, total), self._images(first), strict=True):
                features = self._extraction(images)[: self._rows_of(number)]
                limit = np.finfo(values.dtype).max
                values[row : row + len(features)] = np.clip(features, -limit, limit)
                row += len(features)
                stopped = self._work.workspace.stop.is_set()
                if self._files and (row - stored >= PIECE_IMAGES or row == len(values) or stopped):
                    self._files.write(stored, values[stored:row].copy())
                    stored = row
                if stopped:
                    raise Stopped("Stopped while computing features of the frozen layers; start the same job to go on.")
                tracker.advance()

    def _take(self, values: Array) -> int:
        row = 0
        for piece in self._files.read(values.shape[1:], values.dtype) if self._files else ():
            if row + len(piece) > len(values):
                break
            values[row : row + len(piece)] = piece
            row += len(piece)
        return row

    def _number_of(self, row: int) -> int:
        view, image = divmod(row, self._part.split.size)
        return view * self._batches_a_view + image // self._batch_size

    def _rows_of(self, number: int) -> int:
        return min(self._batch_size, self._part.split.size - number % self._batches_a_view * self._batch_size)

    def _images(self, first: int) -> Any:
        batches = _batches(self._work, self._part, first)
        return self._work.halves.lower.distribute_strategy.experimental_distribute_dataset(batches)


def _batches(work: FeatureJob, part: _Part, first: int) -> Any:
    return view_batches(
        part.split,
        classes=len(work.data.class_names),
        batch_size=work.plan.batch_size,
        views=part.views,
        first=first,
        augment=part.augment,
        seed=work.plan.seed,
    )


def _dtype(work: FeatureJob, extraction: Extraction) -> np.dtype[Any]:
    """Half precision, unless the features of a first batch are too large or too small for it."""
    part = work.parts[-1]
    images = work.halves.lower.distribute_strategy.experimental_distribute_dataset(_batches(work, part, 0))
    largest = float(np.abs(extraction(next(iter(images)))).max())
    return np.dtype(np.float16 if HALF_RANGE[0] <= largest <= HALF_RANGE[1] else np.float32)


def _files(work: FeatureJob, part: _Part, needed: int) -> AbstractContextManager[FeatureFiles | None]:
    if needed > MOST_BYTES:
        return nullcontext()
    return FeatureFiles(work.workspace, f"{work.prefix}/{part.name}")


def _room(work: FeatureJob, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], place: Place) -> Array:
    if place == "memory":
        return np.empty(shape, dtype)
    path = work.workspace.scratch / f"features-{name}.bin"
    with path.open("wb") as file:
        # A disk that is full is told here: a write to memory that has no room behind it kills the process.
        os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * dtype.itemsize)
    return np.memmap(path, dtype, "r+", shape=shape).view(np.ndarray)


def _tell_without_room(work: FeatureJob, needed: int) -> None:
    words = (
        f"the features take {needed / 2**30:.1f} GiB: more than a quarter of the free memory, than half of what is "
        f"free in {work.workspace.scratch} and than a quarter of spec.compute.scratch"
    )
    if work.plan.caching.asked:
        raise SettingError(
            f"featureCache of {work.plan.stage} is on, but {words}. Give more memory or scratch, keep fewer views, use "
            "pooling: avg, or set featureCache: auto."
        )
    work.workspace.progress.note("feature cache", stage=work.plan.stage, used=False, reason=words)
