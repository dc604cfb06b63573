"""Training and evaluation batches: tf.data pipelines over the splits of a local dataset."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from topwork.data.images.decode_pool import available_cpus
from topwork.data.local_dataset import Indices, Split, disable_autotune
from topwork.data.splits.selection import permutation
from topwork.errors import DataError


class Augment(Protocol):
    """Augmentation of training batches, as documented in `topwork.model.augmentation.BatchAugmentation`."""

    def __call__(self, images: tf.Tensor, one_hot: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Augment a whole batch."""

    def sources(self, rows: range, batch_size: int, image_size: tuple[int, int], seed: tf.Tensor) -> tf.Tensor:
        """Return which rows of a batch must be read to augment some of its rows."""

    def rows(
        self, images: tf.Tensor, one_hot: tf.Tensor, rows: range, batch_size: int, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Augment some rows of a batch exactly as in the whole batch."""


@dataclass(frozen=True)
class Shard:
    """The rows of each global batch that one node reads: an equal share of consecutive rows. The default is all rows.

    Attributes:
        index: Index of the node, from 0.
        count: Number of nodes.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Check the index."""
        if not 0 <= self.index < self.count:
            raise ValueError(f"A shard has an index from 0 to its count - 1, not {self.index} of {self.count}.")

    def rows(self, batch_size: int) -> range:
        """Return the rows of this node in a global batch.

        Args:
            batch_size: Global batch size, over all replicas of all nodes.

        Raises:
            ValueError: If the batch does not divide evenly among the nodes.
        """
        if batch_size % self.count:
            raise ValueError(f"A batch of {batch_size} does not divide evenly among {self.count} nodes.")
        share = batch_size // self.count
        return range(self.index * share, (self.index + 1) * share)


ALL_ROWS = Shard()


_PREFETCHED_BATCHES = 2
_MAX_PARALLEL_CALLS = 8

# Keys of independent random streams.
_SHUFFLING, _AUGMENTATION = 0, 1
_UNLIMITED_STEPS = 2**62


def training_batches(  # noqa: PLR0913 - what a batch depends on
    split: Split,
    *,
    classes: int,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    augment: Augment | None = None,
    class_weights: npt.NDArray[np.float32] | None = None,
    shard: Shard = ALL_ROWS,
) -> Any:
    """Return an endless dataset of full training batches, or of the rows of one node in each of them.

    Each epoch iterates over a new permutation of the split and drops the incomplete last batch. The content of a batch
    depends only on the split, the seed and the step, so training can resume at any step with the same batches. The
    rows of all nodes, in the order of the nodes, are exactly the batch that a single node reads.

    Args:
        split: The training images.
        classes: Number of classes.
        batch_size: Global batch size, over all replicas of all nodes.
        seed: Seed of the shuffling and the augmentation.
        first_step: Step of the first batch, counted from 0 over all epochs.
        augment: Augmentation of images and labels. None disables it.
        class_weights: Sample weight of each class, float32 (classes,). None weights all classes equally. An image with
            mixed labels has the mean of the weights of its classes, in the same proportion.
        shard: Rows of each batch to read. Images of other rows are read only if they are mixed into these.

    Returns:
        tf.data.Dataset of (images float32 (rows, height, width, 3) in 0..255, one_hot float32 (rows, classes),
        weights float32 (rows,)), with batch_size / shard.count rows.

    Raises:
        DataError: If the split is smaller than a batch.
        ValueError: If the batch does not divide evenly among the nodes.

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

    own_rows = shard.rows(batch_size)

    def load_batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        rows, labels, view_seed = tf.numpy_function(select, [step], [tf.int64, tf.int64, tf.int32], stateful=False)
        rows, labels = tf.ensure_shape(rows, (batch_size,)), tf.ensure_shape(labels, (batch_size,))
        view_seed = tf.ensure_shape(view_seed, (2,))
        if shard.count > 1:
            positions = tf.range(own_rows.start, own_rows.stop, dtype=tf.int64)
            if augment is not None:
                positions = augment.sources(own_rows, batch_size, split.image_size, view_seed)
            rows, labels = tf.gather(rows, positions), tf.gather(labels, positions)
        images, one_hot = split.gather(rows), tf.one_hot(labels, classes)
        if augment is not None and shard.count > 1:
            images, one_hot = augment.rows(images, one_hot, own_rows, batch_size, view_seed)
        elif augment is not None:
            images, one_hot = augment(images, one_hot, view_seed)
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


def evaluation_batches(
    split: Split,
    *,
    classes: int,
    batch_size: int,
    first: int = 0,
    count: int | None = None,
    shard: Shard = ALL_ROWS,
) -> Any:
    """Return a dataset of full batches that contains every image once, in order, or of the rows of one node in them.

    The last batch is padded with black images of weight 0 and all-zero labels, so that it divides evenly among
    replicas. All nodes get equally many batches and rows; those of some nodes may be only padding. `merge_shards`
    restores the order of the images.

    Args:
        split: The images.
        classes: Number of classes.
        batch_size: Global batch size, over all replicas of all nodes.
        first: First batch.
        count: Number of batches; None for all that follow.
        shard: Rows of each batch to read.

    Returns:
        tf.data.Dataset of (images float32 (rows, height, width, 3) in 0..255, one_hot float32 (rows, classes),
        weights float32 (rows,)), with batch_size / shard.count rows. Weights are 1 for images and 0 for padding.

    Raises:
        ValueError: If the batch does not divide evenly among the nodes.
    """
    load_batch = _sequential_loader(split, classes, batch_size, shard)
    batches = -(-split.size // batch_size)
    return _map_steps(
        tf.data.Dataset.range(first, batches if count is None else min(batches, first + count)), load_batch
    )


def merge_shards(rows: npt.NDArray[Any], batch_size: int, nodes: int) -> npt.NDArray[Any]:
    """Order the rows of all nodes as on a single node.

    Args:
        rows: Array (batches * batch_size, ...): for example the logits of all `evaluation_batches` of node 0, then
            those of node 1, etc., as from `NodeGroup.concatenate_on_chief`.
        batch_size: Global batch size.
        nodes: Number of nodes.

    Returns:
        The same rows, batch by batch. Those of the padding are at the end.

    Raises:
        ValueError: If the rows are not those of whole batches.
    """
    if batch_size % nodes or len(rows) % batch_size:
        raise ValueError(f"{len(rows)} rows are not whole batches of {batch_size} rows from {nodes} nodes.")
    by_node = rows.reshape(nodes, len(rows) // batch_size, batch_size // nodes, *rows.shape[1:])
    return by_node.swapaxes(0, 1).reshape(rows.shape)


def view_batches(  # noqa: PLR0913 - what a view depends on
    split: Split,
    *,
    classes: int,
    batch_size: int,
    views: int,
    augment: Augment | None,
    seed: int,
    numbers: npt.NDArray[np.int64] | None = None,
    parts: int = 1,
) -> Any:
    """Return a dataset of full batches of augmented views: the first view of all images in order, then the second, etc.

    Args:
        split: The images.
        classes: Number of classes.
        batch_size: Global batch size, over all replicas. The last batch of each view is padded with black images.
        views: Number of views per image.
        augment: Augmentation of the images. None disables it.
        seed: Seed of the augmentation.
        numbers: int64 (n,): numbers of the batches, counted over all views; None for all.
        parts: Number of equal parts into which each batch is divided after it was augmented.

    Returns:
        tf.data.Dataset of images float32 (batch_size / parts, height, width, 3) in 0..255.
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
        return images if parts == 1 else tf.reshape(images, (parts, batch_size // parts, *images.shape[1:]))

    chosen = np.arange(batches_per_view * views) if numbers is None else numbers
    batches = _map_steps(tf.data.Dataset.from_tensor_slices(chosen.astype(np.int64)), load_batch)
    return batches if parts == 1 else batches.unbatch()


def _sequential_loader(
    split: Split, classes: int, batch_size: int, shard: Shard = ALL_ROWS
) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    labels, rows = tf.constant(split.labels), shard.rows(batch_size)

    def load_batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        indices = step * batch_size + tf.range(rows.start, rows.stop, dtype=tf.int64)
        weights = tf.cast(indices < split.size, tf.float32)
        indices = tf.minimum(indices, split.size - 1)
        images = split.gather(indices)
        images *= tf.reshape(weights, (len(rows), *[1] * (len(images.shape) - 1)))
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
