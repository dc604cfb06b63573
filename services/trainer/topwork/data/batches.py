"""Training and evaluation batches: tf.data pipelines over the splits of a local dataset."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from topwork.data.images.decode_pool import available_cpus
from topwork.data.local_dataset import Indices, Split, disable_autotune
from topwork.data.splits.selection import permutation
from topwork.errors import DataError

Augment = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
"""Augmentation: (images float32 (batch, height, width, 3) in 0..255, one_hot float32 (batch, classes), seed int32 (2,))
to augmented (images, one_hot) of the same shapes."""

_PREFETCHED_BATCHES = 2
_MAX_PARALLEL_CALLS = 8

# Keys of independent random streams.
_SHUFFLING, _AUGMENTATION = 0, 1
_UNLIMITED_STEPS = 2**62


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
    """Return an endless dataset of full training batches.

    Each epoch iterates over a new permutation of the split and drops the incomplete last batch. The content of a batch
    depends only on the split, the seed and the step, so training can resume at any step with the same batches.

    Args:
        split: The training images.
        classes: Number of classes.
        batch_size: Global batch size, over all replicas.
        seed: Seed of the shuffling and the augmentation.
        first_step: Step of the first batch, counted from 0 over all epochs.
        augment: Augmentation of images and labels. None disables it.
        class_weights: Sample weight of each class, float32 (classes,). None weights all classes equally. An image with
            mixed labels has the mean of the weights of its classes, in the same proportion.

    Returns:
        tf.data.Dataset of (images float32 (batch, height, width, 3) in 0..255, one_hot float32 (batch, classes),
        weights float32 (batch,)).

    Raises:
        DataError: If the split is smaller than a batch.

    Example:
        >>> batches = training_batches(dataset.train, classes=2, batch_size=32, seed=42)
        >>> images, one_hot, weights = next(iter(batches))
    """
    if split.size < batch_size:
        raise DataError(
            f"The training split contains {split.size} images, fewer than one batch of {batch_size}. Set batchSize to "
            f"at most {split.size}, or add images to spec.dataset.splits.train."
        )
    weights = np.ones(classes, np.float32) if class_weights is None else class_weights.astype(np.float32)

    def select(step: np.int64) -> tuple[Indices, npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        indices = _batch_indices(int(step), split.size, batch_size, seed)
        epoch = int(step) // (split.size // batch_size)
        # Rotate through the cached views. Each epoch mixes different views of different images.
        rows = indices + split.size * ((indices + epoch) % split.views)
        return rows, split.labels[indices], _augmentation_seed(int(step), seed)

    def load_batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        rows, labels, view_seed = tf.numpy_function(select, [step], [tf.int64, tf.int64, tf.int32], stateful=False)
        labels = tf.ensure_shape(labels, (batch_size,))
        images = split.gather(tf.ensure_shape(rows, (batch_size,)))
        one_hot = tf.one_hot(labels, classes)
        if augment is not None:
            images, one_hot = augment(images, one_hot, tf.ensure_shape(view_seed, (2,)))
        return images, one_hot, tf.linalg.matvec(one_hot, weights)

    return _map_steps(tf.data.Dataset.range(first_step, _UNLIMITED_STEPS), load_batch)


def batch_image_names(split: Split, step: int, batch_size: int, seed: int) -> list[str]:
    """Return the names of the images in a training batch.

    Args:
        split: The training images.
        step: Step of the batch, counted from 0 over all epochs.
        batch_size: Global batch size, over all replicas.
        seed: Seed of the shuffling.

    Returns:
        Image names, as in the source.
    """
    return [split.names[index] for index in _batch_indices(step, split.size, batch_size, seed)]


def evaluation_batches(split: Split, *, classes: int, batch_size: int, first: int = 0, count: int | None = None) -> Any:
    """Return a dataset of full batches that contains every image once, in order.

    The last batch is padded with black images of weight 0 and all-zero labels, so that it divides evenly among
    replicas.

    Args:
        split: The images.
        classes: Number of classes.
        batch_size: Global batch size, over all replicas.
        first: First batch.
        count: Number of batches; None for all that follow.

    Returns:
        tf.data.Dataset of (images float32 (batch, height, width, 3) in 0..255, one_hot float32 (batch, classes),
        weights float32 (batch,)). Weights are 1 for images and 0 for padding.
    """
    load_batch = _sequential_loader(split, classes, batch_size)
    batches = -(-split.size // batch_size)
    return _map_steps(
        tf.data.Dataset.range(first, batches if count is None else min(batches, first + count)), load_batch
    )


def view_batches(
    split: Split, *, classes: int, batch_size: int, views: int, first: int = 0, augment: Augment | None, seed: int
) -> Any:
    """Return a dataset of full batches of augmented views: the first view of all images in order, then the second, etc.

    Args:
        split: The images.
        classes: Number of classes.
        batch_size: Global batch size, over all replicas. The last batch of each view is padded with black images.
        views: Number of views per image.
        first: First batch, counted over all views.
        augment: Augmentation of the images. None disables it.
        seed: Seed of the augmentation.

    Returns:
        tf.data.Dataset of images float32 (batch, height, width, 3) in 0..255.
    """
    batches_per_view = -(-split.size // batch_size)
    load_sequential = _sequential_loader(split, classes, batch_size)

    def load_batch(number: tf.Tensor) -> tf.Tensor:
        images, one_hot, _ = load_sequential(number % batches_per_view)
        if augment is not None:
            view_seed = tf.numpy_function(
                lambda step: _augmentation_seed(int(step), seed), [number], tf.int32, stateful=False
            )
            images, _ = augment(images, one_hot, tf.ensure_shape(view_seed, (2,)))
        return images

    return _map_steps(tf.data.Dataset.range(first, batches_per_view * views), load_batch)


def _sequential_loader(
    split: Split, classes: int, batch_size: int
) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    labels = tf.constant(split.labels)

    def load_batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        indices = step * batch_size + tf.range(batch_size, dtype=tf.int64)
        weights = tf.cast(indices < split.size, tf.float32)
        indices = tf.minimum(indices, split.size - 1)
        images = split.gather(indices)
        images *= tf.reshape(weights, (batch_size, *[1] * (len(images.shape) - 1)))
        one_hot = tf.one_hot(tf.gather(labels, indices), classes) * weights[:, tf.newaxis]
        return images, one_hot, weights

    return load_batch


def _map_steps(steps: Any, load_batch: Callable[[tf.Tensor], Any]) -> Any:
    parallel = min(available_cpus(), _MAX_PARALLEL_CALLS)
    batches = steps.map(load_batch, num_parallel_calls=parallel, deterministic=True)
    return disable_autotune(batches.prefetch(_PREFETCHED_BATCHES))


def _batch_indices(step: int, size: int, batch_size: int, seed: int) -> Indices:
    epoch, number = divmod(step, size // batch_size)
    return _epoch_order(seed, epoch, size)[number * batch_size : (number + 1) * batch_size]


# Prefetching loads the end of one epoch and the start of the next at the same time.
@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> Indices:
    return permutation(size, seed, _SHUFFLING, epoch)


def _augmentation_seed(step: int, seed: int) -> npt.NDArray[np.int32]:
    return np.random.SeedSequence((seed, _AUGMENTATION, step)).generate_state(2).view(np.int32)
