"""Computes the features of a stage: the frozen part of its classifier runs once over each view of an image."""

import hashlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import tensorflow as tf

from topwork.clients.s3.cleanup import tolerate_cleanup_failure
from topwork.data.batches import view_batches
from topwork.data.local_dataset import Indices, LocalDataset, Split
from topwork.errors import SettingError, Stopped
from topwork.model.augmentation import Augment
from topwork.model.freezing import hash_variables
from topwork.model.partition import Partition
from topwork.training.feature_cache.chunks import MAX_STORED_BYTES, FeatureChunks
from topwork.training.feature_cache.extractor import FeatureExtractor
from topwork.training.feature_cache.placement import allocate, choose_placement
from topwork.training.plan import StageContext

log = structlog.get_logger(__name__)

# float16 has three significant digits for largest absolute values in this range; other features are stored in float32.
FLOAT16_RANGE = (1e-3, 1e4)
# Images per stored chunk: at most this many are computed again on resume.
CHUNK_IMAGES = 1024

Array = npt.NDArray[Any]


class FeatureSplit(Split):
    """A split that provides cached features instead of images, in one or several views."""

    def __init__(self, values: Array, split: Split) -> None:
        """Wrap the features of a split.

        Args:
            values: float16 or float32 (views * images, *features): all images of the first view, then of the second.
            split: The split that the features were computed from.
        """
        self.size = split.size
        self.labels = split.labels
        self.views = len(values) // split.size
        self._values = values
        self._images = split

    @cached_property
    def names(self) -> Sequence[str]:
        """Name of each image in its source."""
        return self._images.names

    def gather(self, indices: tf.Tensor) -> tf.Tensor:
        """Gather features inside a tf.data pipeline.

        Args:
            indices: int64 (n,); view * size + image.

        Returns:
            float32 (n, *features).
        """

        def take(indices: Indices) -> npt.NDArray[np.float32]:
            return np.take(self._values, indices, axis=0).astype(np.float32)

        features = tf.numpy_function(take, [indices], tf.float32, stateful=False)
        return tf.ensure_shape(features, (*indices.shape, *self._values.shape[1:]))


@dataclass(frozen=True)
class _SplitViews:
    """A split to compute features of, with its number of views."""

    name: str
    split: Split
    views: int
    augment: Augment | None


@dataclass(frozen=True)
class FeatureRequest:
    """Everything that the features of a stage depend on.

    Attributes:
        context: The stage.
        data: Its images.
        partition: The classifier; its frozen part computes the features.
        augment: Augmentation of the training images.
    """

    context: StageContext
    data: LocalDataset
    partition: Partition
    augment: Augment | None

    @property
    def splits(self) -> tuple[_SplitViews, ...]:
        """The training images in all views, and the validation images unchanged."""
        views = self.context.plan.feature_cache.views
        train = _SplitViews("train", self.data.train, views, self.augment)
        if self.data.validation is None or not self.data.validation.size:
            return (train,)
        return train, _SplitViews("validation", self.data.validation, 1, None)

    @property
    def images(self) -> int:
        """Images that the frozen part runs over, counting every view."""
        return sum(part.split.size * part.views for part in self.splits)

    @property
    def prefix(self) -> str:
        """Storage key prefix; its hash covers everything that the features depend on."""
        plan = self.context.plan
        facts = (
            hash_variables(self.partition.frozen_part.variables),
            plan.seed,
            plan.feature_cache.views,
            self.partition.feature_shape,
        )
        content = hashlib.sha256(repr((*facts, self.context.job.spec.compute.precision)).encode())
        for part in self.splits:
            content.update(part.split.digests.tobytes())
        return f"{features_prefix(self.context)}/{content.hexdigest()[:16]}"

    def batches(self, part: _SplitViews, first: int) -> Any:
        """Distribute the batches of a split over the replicas, starting with batch `first`."""
        batches = view_batches(
            part.split,
            classes=len(self.data.class_names),
            batch_size=self.context.plan.batch_size,
            views=part.views,
            first=first,
            augment=part.augment,
            seed=self.context.plan.seed,
        )
        return self.partition.frozen_part.distribute_strategy.experimental_distribute_dataset(batches)


def features_prefix(context: StageContext) -> str:
    """Return the storage key prefix of all features that a stage stores while it runs."""
    return f"{context.prefix}/features"


def delete_features(context: StageContext) -> None:
    """Delete the stored features of a completed stage, also on scratch, where the next stage needs the space."""
    delete_local_features(context.workspace.scratch)
    storage = context.workspace.storage
    with tolerate_cleanup_failure(f"features of {context.plan.stage}"):
        storage.delete(stored.key for stored in storage.list(f"{features_prefix(context)}/"))


def delete_local_features(scratch: Path) -> None:
    """Delete features on scratch, which only their own stage and process use. Memory that maps them stays valid."""
    for path in scratch.glob(_feature_file("*")):
        path.unlink(missing_ok=True)


def _feature_file(split: str) -> str:
    return f"features-{split}.bin"


def compute_features(request: FeatureRequest) -> LocalDataset | None:
    """Compute the features of the training views and of the validation images.

    Chunks that an earlier process stored are read from storage.

    Args:
        request: The features to compute.

    Returns:
        Training and validation splits of features, without a test split; None if optional features do not fit.

    Raises:
        SettingError: If the spec requires the feature cache and there is no space for it.
        Stopped: If a stop was requested. Stored features are not computed again.
    """
    start = time.monotonic()
    plan, workspace = request.context.plan, request.context.workspace
    feature_shape = request.partition.feature_shape
    extractor = FeatureExtractor(
        request.partition.frozen_part,
        precision=request.context.job.spec.compute.precision,
        images=request.images,
    )
    dtype = _choose_dtype(request, extractor)
    size_bytes = dtype.itemsize * prod(feature_shape) * request.images
    # Features of an earlier stage, or of a killed process, must not count as used space.
    delete_local_features(workspace.scratch)
    placement = choose_placement(size_bytes, workspace.scratch, request.context.job)
    if placement is None:
        _report_lack_of_space(request.context, size_bytes)
        return None
    splits = {}
    for part in request.splits:
        shape = (part.split.size * part.views, *feature_shape)
        values = allocate(workspace.scratch / _feature_file(part.name), shape, dtype, placement)
        with _open_chunks(request, part, size_bytes) as chunks:
            _SplitExtraction(request, part, extractor, chunks).fill(values)
        splits[part.name] = FeatureSplit(values, part.split)
    log.info(
        "features computed",
        stage=plan.stage,
        views=plan.feature_cache.views,
        shape="x".join(map(str, feature_shape)),
        placement=placement,
        size_mib=size_bytes / 2**20,
        seconds=time.monotonic() - start,
    )
    return LocalDataset(request.data.class_names, splits["train"], splits.get("validation"), None)


class _SplitExtraction:
    """Computes the features of one split, batch by batch."""

    def __init__(
        self, request: FeatureRequest, part: _SplitViews, extractor: FeatureExtractor, chunks: FeatureChunks | None
    ) -> None:
        self._request, self._part, self._extractor, self._chunks = request, part, extractor, chunks
        self._workspace = request.context.workspace
        self._batch_size = request.context.plan.batch_size
        self._batches_per_view = -(-part.split.size // self._batch_size)

    def fill(self, values: Array) -> None:
        """Read the stored features and compute the remaining ones.

        Args:
            values: Array to fill, (views * images, *features).
        """
        row = stored = self._read_stored(values)
        first = self._batch_of(row)
        total = self._batches_per_view * self._part.views
        limit = np.finfo(values.dtype).max
        with self._workspace.track(f"features: {self._part.name}", total - first) as tracker:
            for batch, images in zip(range(first, total), self._request.batches(self._part, first), strict=True):
                features = self._extractor(images)[: self._rows_in(batch)]
                values[row : row + len(features)] = np.clip(features, -limit, limit)
                row += len(features)
                is_stopping = self._workspace.stop.is_set()
                if self._chunks and (row - stored >= CHUNK_IMAGES or row == len(values) or is_stopping):
                    self._chunks.write(stored, values[stored:row])  # filled rows do not change
                    stored = row
                if is_stopping:
                    raise Stopped(
                        "Stopped while computing features of the frozen layers. Start the same job again to resume."
                    )
                tracker.advance()

    def _read_stored(self, values: Array) -> int:
        row = 0
        for chunk in self._chunks.read(values.shape[1:], values.dtype) if self._chunks else ():
            if row + len(chunk) > len(values):
                break
            values[row : row + len(chunk)] = chunk
            row += len(chunk)
        return row

    def _batch_of(self, row: int) -> int:
        view, image = divmod(row, self._part.split.size)
        return view * self._batches_per_view + image // self._batch_size

    def _rows_in(self, batch: int) -> int:
        # The last batch of each view is padded.
        return min(self._batch_size, self._part.split.size - batch % self._batches_per_view * self._batch_size)


def _choose_dtype(request: FeatureRequest, extractor: FeatureExtractor) -> np.dtype[Any]:
    """Choose float16, unless the features of the first batch are too large or too small for it."""
    images = next(iter(request.batches(request.splits[-1], 0)))
    largest = float(np.abs(extractor(images)).max())
    return np.dtype(np.float16 if FLOAT16_RANGE[0] <= largest <= FLOAT16_RANGE[1] else np.float32)


def _open_chunks(
    request: FeatureRequest, part: _SplitViews, size_bytes: int
) -> AbstractContextManager[FeatureChunks | None]:
    if size_bytes > MAX_STORED_BYTES:
        return nullcontext()
    context = request.context
    minutes = context.job.spec.compute.checkpoint_minutes
    return FeatureChunks(context.workspace.storage, f"{request.prefix}/{part.name}", minutes)


def _report_lack_of_space(context: StageContext, size_bytes: int) -> None:
    plan = context.plan
    reason = (
        f"the features take {size_bytes / 2**30:.1f} GiB: more than a quarter of the free memory, and more than "
        f"half of the free space in {context.workspace.scratch} or a quarter of spec.compute.scratch"
    )
    if plan.feature_cache.required:
        raise SettingError(
            f"featureCache of {plan.stage} is on, but {reason}. Provide more memory or scratch, cache fewer views, use "
            "pooling: avg, or set featureCache: auto."
        )
    log.info("feature cache", stage=plan.stage, used=False, reason=reason)
