"""What the features of a stage depend on, and the batches of images that they are computed from."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from topwork.data.batches import Augment, view_batches
from topwork.data.local_dataset import LocalDataset, Split
from topwork.model.freezing import hash_variables
from topwork.model.partition import Partition
from topwork.registry.shared_features import ROOT
from topwork.spec.digest import DIGEST_LENGTH, digest_of
from topwork.training.distribution.replicas import distribute_batches
from topwork.training.feature_cache.extractor import FeatureExtractor, Features
from topwork.training.plan import StageContext

SHARED_FORMAT = 1
"""Version of shared features. Increase it when topwork would compute other features from the same inputs."""

SHARED_BATCH_PER_REPLICA = 32
"""Images of a batch on each replica if trials share the features, whatever their batch size. Without gradients, a batch
needs a fraction of the memory of a training step."""


@dataclass(frozen=True)
class SplitViews:
    """A split to compute features of.

    Attributes:
        name: Name of the split.
        split: Its images.
        views: Number of views of each image.
        augment: Augmentation of the views; None for unchanged images.
    """

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
    def splits(self) -> tuple[SplitViews, ...]:
        """The training images in all views, and the validation images unchanged."""
        views = self.context.plan.feature_cache.views
        train = SplitViews("train", self.data.train, views, self.augment)
        if self.data.validation is None or not self.data.validation.size:
            return (train,)
        return train, SplitViews("validation", self.data.validation, 1, None)

    @property
    def images(self) -> int:
        """Images that the frozen part runs over, counting every view."""
        return sum(part.split.size * part.views for part in self.splits)

    @property
    def batch_size(self) -> int:
        """Images of a batch over all replicas: that of training, but a fixed one if trials share the features."""
        plan = self.context.plan
        if not plan.feature_cache.shared:
            return plan.batch_size
        replicas: int = self.partition.frozen_part.distribute_strategy.num_replicas_in_sync
        return SHARED_BATCH_PER_REPLICA * replicas

    @cached_property
    def prefix(self) -> str:
        """Storage key prefix; its hash covers everything that the features depend on."""
        plan = self.context.plan
        if plan.feature_cache.shared:
            return f"{ROOT}/{self._shared_key()}"
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

    def _shared_key(self) -> str:
        """Return a digest of everything that the features depend on, in any run."""
        plan, images = self.context.plan, self.data.train
        facts = [
            SHARED_FORMAT,
            [tf.__version__, keras.__version__],
            [hash_variables(self.partition.frozen_part.variables), self.partition.frozen_part.to_json()],
            self.context.job.spec.compute.precision,
            [images.image_size, str(images.preprocessing)],
            self.context.job.spec.augmentation.model_dump(mode="json"),
            # What happens to an image depends on its batch.
            [plan.seed, plan.feature_cache.views, self.batch_size],
            [hashlib.sha256(part.split.digests.tobytes()).hexdigest() for part in self.splits],
        ]
        return digest_of(facts)[:DIGEST_LENGTH]

    def extract(self, part: SplitViews, extractor: FeatureExtractor, numbers: Sequence[int]) -> Iterator[Features]:
        """Compute the features of whole batches on this node.

        A batch runs in as many parts as there are nodes: the replicas of this node get as many images at a time as in
        training, and have memory for no more.

        Args:
            part: The split.
            extractor: Computes the features.
            numbers: Numbers of the batches, counted over all views.

        Yields:
            float32 (batch, *features), also of the padding of the last batch of each view.
        """
        if not numbers:
            return
        parts = self.context.workspace.nodes.count
        images = iter(self._distributed_images(part, numbers))
        for _ in numbers:
            features = [extractor(next(images)) for _ in range(parts)]
            yield features[0] if parts == 1 else np.concatenate(features)

    def _distributed_images(self, part: SplitViews, numbers: Sequence[int]) -> Iterable[Any]:
        strategy = self.partition.frozen_part.distribute_strategy
        batches = view_batches(
            part.split,
            classes=len(self.data.class_names),
            batch_size=self.batch_size,
            views=part.views,
            augment=part.augment,
            seed=self.context.plan.seed,
            numbers=np.array(numbers, np.int64),
            parts=self.context.workspace.nodes.count,
        )
        return distribute_batches(batches, strategy)


def features_prefix(context: StageContext) -> str:
    """Return the storage key prefix of all features that a stage stores while it runs."""
    return f"{context.prefix}/features"
