"""Batches for training and evaluation, made by tf.data from a split on scratch."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from topwork.data.decode_pool import usable_cores
from topwork.data.local_dataset import Indices, Split, fixed
from topwork.data.splits import permutation
from topwork.errors import DataError

Augment = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
"""(images float32 (batch, height, width, 3) in 0..255, one_hot float32 (batch, classes), seed int32 (2,)) to the first
two, changed."""

_AHEAD = 2
"""Batches that wait for the model."""

_ORDER, _VIEWS = 0, 1  # what a random number is for: the order of an epoch, or the views of a step
_ENDLESS = 2**62


def training_batches(
    split: Split,
    *,
    classes: int,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    augment: Augment | None = None,
    class_weights: npt.NDArray[np.float32] | None = None,
) -> Any:
    """Make an endless stream of full training batches.

    Each epoch goes once through a new permutation of the split; what is left over of it when batches are cut stays
    out. Batch number `step`, counted over all epochs from 0, depends on the split, the seed and the step alone, so that
    training goes on exactly from any step.

    Args:
        split: The training images.
        classes: Classes.
        batch_size: Images a batch, over all replicas.
        seed: Of the order and the views.
        first_step: Batch to begin with.
        augment: Changes images and labels; None leaves them.
        class_weights: float32 (classes,), weight of the images of each class; None is 1.

    Returns:
        tf.data.Dataset of (images float32 (batch, height, width, 3) in 0..255, one_hot float32 (batch, classes),
        weights float32 (batch,)).

    Raises:
        DataError: If the split is smaller than a batch.
    """
    if split.size < batch_size:
        raise DataError(
            f"The training split holds {split.size} images, less than one batch of {batch_size}. Give a batchSize of "
            f"at most {split.size}, or more images in spec.dataset.splits.train."
        )
    weights = np.ones(classes, np.float32) if class_weights is None else class_weights.astype(np.float32)

    def choose(step: np.int64) -> tuple[Indices, npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        indices = _indices(int(step), split.size, batch_size, seed)
        epoch = int(step) // (split.size // batch_size)
        # Kept views take turns, and not all images are at the same one.
        places = indices + split.size * ((indices + epoch) % split.views)
        return places, split.labels[indices], _view_seed(int(step), seed)

    def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        places, labels, view_seed = tf.numpy_function(choose, [step], [tf.int64, tf.int64, tf.int32], stateful=False)
        labels = tf.ensure_shape(labels, (batch_size,))
        images = split.gather(tf.ensure_shape(places, (batch_size,)))
        one_hot = tf.one_hot(labels, classes)
        if augment is not None:
            images, one_hot = augment(images, one_hot, tf.ensure_shape(view_seed, (2,)))
        return images, one_hot, tf.gather(weights, labels)

    return _batches(tf.data.Dataset.range(first_step, _ENDLESS), batch)


def names_in_batch(split: Split, step: int, batch_size: int, seed: int) -> list[str]:
    """Name the images of a training batch.

    Args:
        split: The training images.
        step: Number of the batch, counted over all epochs from 0.
        batch_size: Images a batch, over all replicas.
        seed: Of the order and the views.

    Returns:
        Their origins, as their source called them.
    """
    return [split.names[index] for index in _indices(step, split.size, batch_size, seed)]


def evaluation_batches(split: Split, *, classes: int, batch_size: int) -> Any:
    """Make full batches of every image once, in order.

    The last batch is filled up with black images of weight 0 and no class, so that replicas share it evenly.

    Args:
        split: The images.
        classes: Classes.
        batch_size: Images a batch, over all replicas.

    Returns:
        tf.data.Dataset of (images float32 (batch, height, width, 3) in 0..255, one_hot float32 (batch, classes),
        weights float32 (batch,), 1 or 0).
    """
    batch = _in_order(split, classes, batch_size)
    return _batches(tf.data.Dataset.range(-(-split.size // batch_size)), batch)


def view_batches(
    split: Split, *, classes: int, batch_size: int, views: int, first: int = 0, augment: Augment | None, seed: int
) -> Any:
    """Make full batches of one view after another of all images, each view in order.

    Args:
        split: The images.
        classes: Classes.
        batch_size: Images a batch, over all replicas. The last batch of each view is filled up with black images.
        views: Views of each image.
        first: Batch to begin with, counted over all views.
        augment: Changes the images; None leaves them.
        seed: Of the views.

    Returns:
        tf.data.Dataset of images float32 (batch, height, width, 3) in 0..255.
    """
    in_view = -(-split.size // batch_size)
    in_order = _in_order(split, classes, batch_size)

    def batch(number: tf.Tensor) -> tf.Tensor:
        images, one_hot, _ = in_order(number % in_view)
        if augment is not None:
            view_seed = tf.numpy_function(lambda one: _view_seed(int(one), seed), [number], tf.int32, stateful=False)
            images, _ = augment(images, one_hot, tf.ensure_shape(view_seed, (2,)))
        return images

    return _batches(tf.data.Dataset.range(first, in_view * views), batch)


def _in_order(
    split: Split, classes: int, batch_size: int
) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    labels = tf.constant(split.labels)

    def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        indices = step * batch_size + tf.range(batch_size, dtype=tf.int64)
        real = indices < split.size
        weights = tf.cast(real, tf.float32)
        within = tf.minimum(indices, split.size - 1)
        images = split.gather(within)
        images *= tf.reshape(weights, (batch_size, *[1] * (len(images.shape) - 1)))
        one_hot = tf.one_hot(tf.gather(labels, within), classes) * weights[:, tf.newaxis]
        return images, one_hot, weights

    return batch


def _batches(steps: Any, batch: Callable[[tf.Tensor], Any]) -> Any:
    parallel = min(usable_cores(), 8)
    return fixed(steps.map(batch, num_parallel_calls=parallel, deterministic=True).prefetch(_AHEAD))


def _indices(step: int, size: int, batch_size: int, seed: int) -> Indices:
    epoch, number = divmod(step, size // batch_size)
    return _order(seed, epoch, size)[number * batch_size : (number + 1) * batch_size]


# The end of an epoch and the beginning of the next are in work at the same time.
@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> Indices:
    return permutation(size, seed, _ORDER, epoch)


def _view_seed(step: int, seed: int) -> npt.NDArray[np.int32]:
    return np.random.SeedSequence((seed, _VIEWS, step)).generate_state(2).view(np.int32)
