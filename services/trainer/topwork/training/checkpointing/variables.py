"""Variables that a stage changes: copies their values to and from checkpoints, and keeps the best ones."""

import hashlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from topwork.errors import DataError, FormatError
from topwork.model.freezing import frozen_variables, hash_variables
from topwork.nodes.group import NodeGroup
from topwork.training.checkpointing.checkpoints import Checkpoint
from topwork.training.checkpointing.train_state import TrainState


class StageVariables:
    """The variables of the classifier, its optimizer and its running metrics that a stage changes.

    The variables of the classifier are chosen once, with every layer unfrozen that any phase trains: checkpoints of
    all phases contain the same variables.
    """

    def __init__(self, classifier: keras.Model, fit_model: keras.Model, nodes: NodeGroup) -> None:
        """Choose the variables.

        Args:
            classifier: The whole classifier, unfrozen as in its last phase.
            fit_model: The model that is trained; it shares the layers of the classifier.
            nodes: The nodes that train the run.
        """
        never_trained = frozen_variables(classifier)
        excluded = {id(variable) for variable in never_trained}
        self.frozen_hash = hash_variables(never_trained)
        self._variables = [variable for variable in classifier.variables if id(variable) not in excluded]
        self._fit_model, self._nodes = fit_model, nodes
        self._accuracy: keras.metrics.Metric | None = None
        self._best: list[np.ndarray] = []
        self._latest: list[np.ndarray] = []
        self._restored: Checkpoint | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the weights of a checkpoint now, its optimizer and running metrics as soon as they exist.

        Raises:
            DataError: If the stage started with a different base.
            FormatError: If the variables of the model differ in number or shape.
        """
        if checkpoint.state.frozen != self.frozen_hash:
            raise DataError(
                "The base is not the one that this stage started with, so its checkpoint cannot be used. Start over "
                "with --restart."
            )
        write_values(self._variables, checkpoint.values["model"])
        self._best = checkpoint.values.get("best", [])
        self._restored = checkpoint

    def attach_accuracy(self, accuracy: keras.metrics.Metric) -> None:
        """Attach the accuracy metric and create the optimizer variables after `compile`.

        The optimizer variables are restored if a checkpoint was read.

        Args:
            accuracy: The metric that the model was compiled with.
        """
        self._accuracy = accuracy
        self._fit_model.optimizer.build(self._fit_model.trainable_variables)
        if self._restored is not None:
            write_values(self._fit_model.optimizer.variables, self._restored.values["optimizer"])

    def restore_running_metrics(self, *, mid_epoch: bool) -> None:
        """Restore loss and accuracy of an epoch that was interrupted; call it after they were reset.

        Args:
            mid_epoch: Whether steps of the current epoch are completed.
        """
        if self._restored is not None and mid_epoch:
            self._replica_metrics().write(self._restored.values["metrics"])
        self._restored = None

    def save_latest(self) -> None:
        """Copy the current weights, which training continues from."""
        self._latest = read_values(self._variables)

    def load_latest(self) -> None:
        """Set the weights to the last copy."""
        write_values(self._variables, self._latest)

    def save_best(self) -> None:
        """Keep the current weights as those of the best epoch."""
        self._best = read_values(self._variables)

    def load_best(self) -> None:
        """Set the weights to those of the best epoch. The phase is complete, so its optimizer is no longer restored."""
        write_values(self._variables, self._best)
        self._restored = None

    def hash_all(self) -> str:
        """Return a hash of the current weights and those of the best epoch."""
        content = hashlib.sha256(hash_variables(self._variables).encode())
        for value in self._best:
            content.update(value.tobytes())
        return content.hexdigest()

    def snapshot(self, state: TrainState) -> Checkpoint:
        """Copy everything that training changes. All nodes must call this after the same step.

        Args:
            state: State of the stage.
        """
        values = {
            "model": read_values(self._variables),
            "optimizer": read_values(self._fit_model.optimizer.variables),
            "best": self._best,
        }
        if state.step:
            values["metrics"] = self._replica_metrics().read()
        return Checkpoint(state.model_copy(deep=True), values)

    def _replica_metrics(self) -> "_ReplicaVariables":
        means = [metric for metric in self._fit_model.metrics if metric.name == "loss"]
        variables = [variable for metric in (*means, self._accuracy) for variable in metric.variables]
        return _ReplicaVariables(variables, self._fit_model.distribute_strategy, self._nodes)


class _ReplicaVariables:
    """Variables whose values differ between replicas: a running metric is the sum over all of them.

    TensorFlow only writes and reads the sum, which rounds differently than the sums that the replicas would continue.
    """

    def __init__(self, variables: list[Any], strategy: tf.distribute.Strategy, nodes: NodeGroup) -> None:
        self._copies = [strategy.experimental_local_results(variable.value) for variable in variables]
        self._replicas, self._nodes = strategy.num_replicas_in_sync, nodes

    def read(self) -> list[np.ndarray]:
        """Return the values of all replicas of all nodes: float32 (), or (replicas,) with several replicas."""
        by_node = self._nodes.gather([[float(copy.numpy()) for copy in copies] for copies in self._copies])
        values = [np.concatenate(of_nodes).astype(np.float32) for of_nodes in zip(*by_node, strict=True)]
        return values if self._replicas > 1 else [value[0] for value in values]

    def write(self, values: list[np.ndarray]) -> None:
        """Set the values of the replicas of this node.

        Args:
            values: From `read`. With another number of replicas than now, the first one gets the sum.
        """
        for copies, value in zip(self._copies, values, strict=True):
            by_replica = np.atleast_1d(value)
            if len(by_replica) != self._replicas:
                by_replica = np.concatenate([[by_replica.sum(dtype=np.float32)], np.zeros(self._replicas - 1)])
            for index, copy in enumerate(copies, self._nodes.index * len(copies)):
                copy.assign(np.float32(by_replica[index]))


def read_values(variables: list[Any]) -> list[np.ndarray]:
    """Copy the values of variables to memory that training does not touch."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def write_values(variables: list[Any], values: list[np.ndarray]) -> None:
    """Set variables to values.

    Raises:
        FormatError: If their number or shapes differ.
    """
    shapes = [tuple(variable.shape) for variable in variables]
    if shapes != [value.shape for value in values]:
        raise FormatError(
            "A checkpoint of this run does not fit its model: it was written by another version of topwork or Keras. "
            "Start over with --restart."
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def all_finite(values: list[np.ndarray]) -> bool:
    """Return whether all floating-point values are finite."""
    return all(np.isfinite(value).all() for value in values if np.issubdtype(value.dtype, np.floating))
