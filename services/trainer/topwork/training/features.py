"""The output of a frozen base, computed once for each view of an image instead of once an epoch."""

import shutil
import time
from math import prod
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from topwork.data.batches import evaluation_batches
from topwork.data.local import LocalDataset, Split
from topwork.errors import SpecError, Stopped
from topwork.model.augmentation import Augment
from topwork.spec.job import JobSpec
from topwork.workspace import Workspace

# Views of each training image at most: more of them cost as much as the epochs that they save.
MOST_VIEWS = 4
# Share of the free scratch that features may take.
SCRATCH_SHARE = 0.5


def views(spec: JobSpec, *, augmented: bool) -> int:
    """Say how many views of each training image are kept as features.

    Args:
        spec: The job's `spec`.
        augmented: Whether training images are changed at random.

    Returns:
        0 where the base runs in every epoch; 1 without augmentation.

    Raises:
        SpecError: If `featureCache: on` can't be had.
    """
    settings = spec.transfer
    if settings.feature_cache == "off" or settings.train == "all":
        return 0
    if spec.augmentation.mix_up or spec.augmentation.cut_mix:
        if settings.feature_cache == "on":
            raise SpecError(
                "spec.transfer.featureCache is on, but mixUp and cutMix mix other images at each step, and features of "
                "mixtures can't be kept. Set featureCache: auto, or take them out of spec.augmentation."
            )
        return 0
    count = min(settings.epochs, MOST_VIEWS) if augmented else 1
    return count if settings.feature_cache == "on" or settings.epochs > count else 0


class FeatureSplit(Split):
    """Features in the place of images: maps float32 (height, width, channels), a view or several of each image."""

    def __init__(self, values: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
        """Take features.

        Args:
            values: float32 (images, views, height, width, channels).
            labels: int64 (images,).
        """
        self.size = len(labels)
        self.labels = labels
        self._values = values

    def gather(self, indices: tf.Tensor) -> tf.Tensor:
        """Give features inside tf.data.

        Args:
            indices: int64 (n,).

        Returns:
            float32 (n, height, width, channels), or (n, views, height, width, channels) where there are several.
        """
        single = self._values.shape[1] == 1
        shape = (*self._values.shape[2:],) if single else self._values.shape[1:]

        def take(chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            return np.take(self._values, chosen, axis=0).reshape(len(chosen), *shape)

        features = tf.numpy_function(take, [indices], tf.float32, stateful=False)
        return tf.ensure_shape(features, (*indices.shape, *shape))


def pick(features: tf.Tensor, one_hot: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Choose one of the views of each image, in the place of augmentation."""
    count, kept = features.shape[0], features.shape[1]
    chosen = tf.random.stateless_uniform((count,), seed, 0, kept, tf.int32)
    return tf.gather(features, chosen, batch_dims=1), one_hot


class Head:
    """The head of a classifier, apart from its base: trained on features, it is trained in the classifier too."""

    def __init__(self, model: keras.Model) -> None:
        """Cut a classifier in two; call it in the scope of the strategy.

        Args:
            model: Classifier whose head is a chain of layers above "base". Its layers are shared, not copied.
        """
        above = model.layers[model.layers.index(model.get_layer("base")) + 1 :]
        pooled = above[0].name == "pooling"
        tensor = above[0].output if pooled else above[0].input
        self.extractor = keras.Model(model.inputs[0], tensor, name="extractor")
        # A vector is kept as a map of one pixel, whose pooling is the vector again.
        self.shape = (1, 1, int(tensor.shape[-1])) if len(tensor.shape) == 2 else tuple(tensor.shape[1:])
        maps = keras.Input(self.shape, name="features")
        outputs: Any = maps
        if len(above[0].input.shape) == 2:
            outputs = keras.layers.Flatten(name="vector")(outputs)
        for layer in above:
            outputs = layer(outputs)
        self.model = keras.Model(maps, outputs, name="head")


def bytes_needed(shape: tuple[int, ...], data: LocalDataset, count: int) -> int:
    """Say how many bytes of scratch the features of a dataset take: 4 a value."""
    validation = data.validation.size if data.validation else 0
    return 4 * prod(shape) * (data.train.size * count + validation)


def fits(needed: int, scratch: Path) -> bool:
    """Say whether scratch has room for features."""
    return needed <= SCRATCH_SHARE * shutil.disk_usage(scratch).free


def computed(
    head: Head,
    data: LocalDataset,
    augment: Augment | None,
    *,
    count: int,
    seed: int,
    batch_size: int,
    workspace: Workspace,
) -> LocalDataset:
    """Run the base over the training views and the validation images.

    Args:
        head: The classifier, cut in two.
        data: Its images.
        augment: Changes of the training images.
        count: Views of each training image.
        seed: Seed of the views.
        batch_size: Images a step over all replicas.
        workspace: Scratch, progress and the sign to stop.

    Returns:
        The same splits as features on scratch; the test split is None.

    Raises:
        Stopped: If asked to stop; features are computed again by the next run.
    """
    began = time.monotonic()
    run = _Run(head, batch_size, workspace)
    train = run(data.train, "features-train.f32", len(data.class_names), augment, count, seed)
    validation = data.validation and run(
        data.validation, "features-validation.f32", len(data.class_names), None, 1, seed
    )
    workspace.progress.note("features of the frozen base", views=count, seconds=time.monotonic() - began)
    return LocalDataset(data.class_names, train, validation or None, None)


class _Run:
    """Runs an extractor over splits, on all replicas."""

    def __init__(self, head: Head, batch_size: int, workspace: Workspace) -> None:
        self._head = head
        self._batch_size = batch_size
        self._workspace = workspace
        self._strategy = head.extractor.distribute_strategy
        extractor = head.extractor
        self._step = tf.function(
            lambda images: self._strategy.run(
                lambda one: tf.cast(extractor(one, training=False), tf.float32), (images,)
            )
        )

    def __call__(
        self, split: Split, file: str, classes: int, augment: Augment | None, count: int, seed: int
    ) -> FeatureSplit:
        path = self._workspace.scratch / file
        values = np.memmap(path, np.float32, "w+", shape=(split.size, count, *self._head.shape))
        batches = evaluation_batches(split, classes=classes, batch_size=self._batch_size)
        total = -(-split.size // self._batch_size) * count
        with self._workspace.progress.track("features", total) as tracker:
            for view in range(count):
                images = self._strategy.experimental_distribute_dataset(
                    _viewed(batches, augment, (seed + view) % 2**31)
                )
                for start, batch in zip(range(0, split.size, self._batch_size), images, strict=True):
                    if self._workspace.stop.is_set():
                        raise Stopped("Stopped while computing features of the frozen base; run the same job again.")
                    parts = self._strategy.experimental_local_results(self._step(batch))
                    features = np.concatenate([part.numpy() for part in parts])[: split.size - start]
                    values[start : start + len(features), view] = features.reshape(len(features), *self._head.shape)
                    tracker.advance()
        return FeatureSplit(values.view(np.ndarray), split.labels)


def _viewed(batches: tf.data.Dataset, augment: Augment | None, seed: int) -> tf.data.Dataset:
    if augment is None:
        return batches.map(lambda images, *_: images)

    def change(step: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tf.Tensor:
        images, one_hot, _ = batch
        return augment(images, one_hot, tf.stack([tf.constant(seed), tf.cast(step, tf.int32)]))[0]

    return batches.enumerate().map(change)
