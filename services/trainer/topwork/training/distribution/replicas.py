"""Data and results of the replicas of this node, for one and for several nodes."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf


def distribute_endless_batches(batches: tf.data.Dataset, strategy: tf.distribute.Strategy) -> Iterable[Any]:
    """Divide the batches of this node among its replicas, without communication between nodes.

    Args:
        batches: Endless dataset of batches of this node; their rows must be a multiple of its replicas.
        strategy: The strategy of the process.

    Returns:
        Iterable of batches for `strategy.run`.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return _distribute_dataset(batches, strategy)
    # Before each batch of a dataset that may end, the nodes would agree on whether all of them have another one.
    endless = batches.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    replicas = local_replicas(strategy)
    if replicas > 1:
        endless = endless.flat_map(lambda *batch: tf.data.Dataset.from_tensor_slices(_divide(batch, replicas)))
    distributed: Iterable[Any] = strategy.distribute_datasets_from_function(lambda _: endless)
    return distributed


def distribute_batches(batches: tf.data.Dataset, strategy: tf.distribute.Strategy) -> Iterable[Any]:
    """Divide the batches of this node among its replicas, like `distribute_endless_batches`, for any dataset of rows.

    Args:
        batches: Dataset of the rows of this node, (rows, ...); their number must be a multiple of its replicas.
        strategy: The strategy of the process.

    Returns:
        Iterable of batches for `strategy.run`.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return _distribute_dataset(batches, strategy)
    return (_distribute_rows(rows, strategy) for rows in batches)


def _distribute_dataset(batches: tf.data.Dataset, strategy: tf.distribute.Strategy) -> Iterable[Any]:
    distributed: Iterable[Any] = strategy.experimental_distribute_dataset(batches)
    return distributed


def _distribute_rows(rows: tf.Tensor, strategy: tf.distribute.Strategy) -> Any:
    replicas = local_replicas(strategy)
    parts = _divide(rows, replicas)
    return strategy.experimental_distribute_values_from_function(
        lambda context: parts[context.replica_id_in_sync_group % replicas]
    )


def local_replicas(strategy: tf.distribute.Strategy) -> int:
    """Return the number of replicas on this node."""
    return len(strategy.extended.worker_devices)


def local_rows(strategy: tf.distribute.Strategy, values: Any) -> npt.NDArray[Any]:
    """Concatenate what the replicas of this node returned.

    Args:
        strategy: The strategy of the process.
        values: Result of `strategy.run`: a tensor per replica, (rows, ...).

    Returns:
        Array of the rows of all replicas of this node.
    """
    return np.concatenate([np.asarray(value) for value in strategy.experimental_local_results(values)])


def _divide(batch: Any, replicas: int) -> Any:
    return tf.nest.map_structure(
        lambda rows: tf.reshape(rows, (replicas, rows.shape[0] // replicas, *rows.shape[1:])), batch
    )
