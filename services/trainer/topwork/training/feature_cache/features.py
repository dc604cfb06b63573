"""Computes the features of a stage: the frozen part of its classifier runs once over each view of an image."""

import time
from collections.abc import Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import tensorflow as tf

from topwork.clients.s3.cleanup import tolerate_cleanup_failure
from topwork.data.local_dataset import Indices, LocalDataset, Split
from topwork.errors import SettingError
from topwork.registry.shared_features import mark_used, owner_of
from topwork.training.feature_cache.chunks import MAX_STORED_BYTES, FeatureChunks
from topwork.training.feature_cache.extraction import SplitExtraction
from topwork.training.feature_cache.extractor import FeatureExtractor
from topwork.training.feature_cache.placement import Placement, allocate, choose_placement
from topwork.training.feature_cache.request import FeatureRequest, SplitViews, features_prefix
from topwork.training.feature_cache.units import FeatureUnits, divide_into_units
from topwork.training.plan import StageContext

log = structlog.get_logger(__name__)

# float16 has three significant digits for largest absolute values in this range; other features are stored in float32.
FLOAT16_RANGE = (1e-3, 1e4)

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


def delete_features(context: StageContext) -> None:
    """Delete the features of a completed stage on scratch, where the next stage needs the space, and in storage.

    Only the chief deletes those in storage. Shared features are kept for other runs.
    """
    if context.plan.feature_cache.shared:
        return
    delete_local_features(context.workspace.scratch)
    if not context.workspace.nodes.is_chief:
        return
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

    Chunks that an earlier process stored are read from storage. Several nodes share the computation, and get the
    features of each other from storage. Shared features that this process has computed before are used again. This is a
    collective operation.

    Args:
        request: The features to compute.

    Returns:
        Training and validation splits of features, without a test split; None if optional features do not fit.

    Raises:
        SettingError: If the spec requires the feature cache and there is no space for it.
        Stopped: If a stop was requested on any node. Stored features are not computed again.
        UnavailableError: If features cannot be stored for too long, or those of another node cannot be read.
    """
    if (values := _find_recent(request)) is not None:
        log.info("features used again", stage=request.context.plan.stage)
        return _wrap(request, values)
    values = _compute(request)
    return None if values is None else _wrap(request, values)


def _find_recent(request: FeatureRequest) -> dict[str, Array] | None:
    """Return the shared features that an earlier run of this process used in the same stage, if these are the same."""
    workspace = request.context.workspace
    if not request.context.plan.feature_cache.shared or workspace.nodes.count > 1:
        return None
    found: dict[str, Array] | None = workspace.recent.find(_kind(request), request.prefix)
    # Other features need the space.
    if found is None:
        workspace.recent.drop(_kind(request))
    return found


def _kind(request: FeatureRequest) -> str:
    return f"features of {request.context.plan.stage}"


def _wrap(request: FeatureRequest, values: dict[str, Array]) -> LocalDataset:
    splits = {part.name: FeatureSplit(values[part.name], part.split) for part in request.splits}
    return LocalDataset(request.data.class_names, splits["train"], splits.get("validation"), None)


def _compute(request: FeatureRequest) -> dict[str, Array] | None:
    start = time.monotonic()
    plan, workspace = request.context.plan, request.context.workspace
    extractor = FeatureExtractor(
        request.partition.frozen_part,
        precision=request.context.job.spec.compute.precision,
        images=request.images,
        nodes=workspace.nodes,
    )
    dtype = _choose_dtype(request, extractor)
    size_bytes = dtype.itemsize * prod(request.partition.feature_shape) * request.images
    # Features of an earlier stage, or of a killed process, must not count as used space.
    delete_local_features(workspace.scratch)
    placement = _agree_on_placement(request.context, size_bytes)
    if placement is None:
        return None
    workspace.nodes.require_equal("The storage key of the features", request.prefix)
    store = workspace.nodes.count > 1 or size_bytes <= MAX_STORED_BYTES
    if plan.feature_cache.shared and store and workspace.nodes.is_chief:
        mark_used(workspace.storage, request.prefix, owner_of(request.context.job))
    values = {}
    for part in request.splits:
        values[part.name] = _allocate(request, part, dtype, placement)
        units = divide_into_units(part.split.size, part.views, request.batch_size, values[part.name][:1].nbytes)
        with _open_chunks(request, part, units) as chunks:
            SplitExtraction(request, part, extractor, units, chunks).fill(values[part.name], store=store)
    log.info(
        "features computed",
        stage=plan.stage,
        views=plan.feature_cache.views,
        shape="x".join(map(str, request.partition.feature_shape)),
        placement=placement,
        size_mib=size_bytes / 2**20,
        seconds=time.monotonic() - start,
    )
    if plan.feature_cache.shared:
        workspace.recent.keep(_kind(request), request.prefix, values)
    return values


def _allocate(request: FeatureRequest, part: SplitViews, dtype: np.dtype[Any], placement: Placement) -> Array:
    shape = (part.split.size * part.views, *request.partition.feature_shape)
    return allocate(request.context.workspace.scratch / _feature_file(part.name), shape, dtype, placement)


def _open_chunks(request: FeatureRequest, part: SplitViews, units: FeatureUnits) -> FeatureChunks:
    """Open the stored units of a split. The key names their size: units of another size are never read."""
    prefix = f"{request.prefix}/{part.name}/{units.batches_per_unit}-batches"
    minutes = request.context.job.spec.compute.checkpoint_minutes
    return FeatureChunks(request.context.workspace.storage, prefix, minutes)


def _choose_dtype(request: FeatureRequest, extractor: FeatureExtractor) -> np.dtype[Any]:
    """Choose float16, unless the features of the first batch are too large or too small for it."""
    features = next(request.extract(request.splits[-1], extractor, [0]))
    largest = float(np.abs(features).max())
    # Near a limit of the range, the nodes could choose differently: they may differ in the last digits.
    fits = request.context.workspace.nodes.broadcast(FLOAT16_RANGE[0] <= largest <= FLOAT16_RANGE[1])
    return np.dtype(np.float16 if fits else np.float32)


def _agree_on_placement(context: StageContext, size_bytes: int) -> Placement | None:
    """Choose where this node keeps the features; None if they do not fit on all nodes."""
    placements = context.workspace.nodes.gather(choose_placement(size_bytes, context.workspace.scratch, context.job))
    if None not in placements:
        chosen: Placement = placements[context.workspace.nodes.index]
        return chosen
    _report_lack_of_space(context, size_bytes, [index for index, place in enumerate(placements) if place is None])
    return None


def _report_lack_of_space(context: StageContext, size_bytes: int, nodes: list[int]) -> None:
    plan = context.plan
    where = f" on node {', '.join(map(str, nodes))}" if context.workspace.nodes.count > 1 else ""
    reason = (
        f"the features take {size_bytes / 2**30:.1f} GiB: more than a quarter of the free memory, and more than "
        f"half of the free space in {context.workspace.scratch} or a quarter of spec.compute.scratch{where}"
    )
    if plan.feature_cache.required:
        raise SettingError(
            f"featureCache of {plan.stage} is on, but {reason}. Provide more memory or scratch, cache fewer views, use "
            "pooling: avg, or set featureCache: auto."
        )
    log.info("feature cache", stage=plan.stage, used=False, reason=reason)
