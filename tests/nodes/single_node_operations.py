"""Operations that one node of several runs alone, each with what is expected to happen.

A node is `python -c "from tests.nodes.single_node_operations import main; main()" PIPE INDEX ADDRESS ADDRESS`. It
creates the strategy and a model, trains a step, and then reads names of operations from the named pipe, one per line.
Each runs in a thread of its own, so that the process survives an operation that waits for the other node. When the node
is ready, and when an operation ends, it writes a line: a hash of its variables, and `ready`, `ended` or the error.
"""

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class Verdict(Enum):
    """What happens when one node runs an operation alone."""

    SAFE = "safe"
    LOCAL = "safe, changes this node only"
    HANGS = "hangs until all nodes run it"
    FAILS = "hangs, and fails if all nodes run it"


@dataclass
class TrainingState:
    """What training has created on each node."""

    strategy: tf.distribute.Strategy
    model: keras.Model
    step: Callable[[Any], tf.Tensor]
    directory: Path
    saved: Path

    @property
    def batch(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Return images, float32 (4, 8, 8, 3), and labels, float32 (4, 1)."""
        return tf.constant(IMAGES), tf.constant(LABELS)

    def dataset(self) -> tf.data.Dataset:
        """Return two batches."""
        return tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(2, drop_remainder=True)

    def hash(self) -> str:
        """Return a hash of all variables except those of the metrics, which one node cannot read."""
        variables = [*self.model.variables, *self.model.optimizer.variables]
        return hashlib.sha256(b"".join(np.asarray(variable.numpy()).tobytes() for variable in variables)).hexdigest()


Function = Callable[[TrainingState], Any]


@dataclass(frozen=True)
class Operation:
    """An operation, and what happens when one node runs it alone."""

    verdict: Verdict
    run: Function


OPERATIONS: dict[str, Operation] = {}
IMAGES = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
LABELS = np.array([[0.0], [1.0], [0.0], [1.0]], np.float32)


def operation(name: str, verdict: Verdict) -> Callable[[Function], Function]:
    """Add a function to OPERATIONS."""

    def add(function: Function) -> Function:
        OPERATIONS[name] = Operation(verdict, function)
        return function

    return add


def in_scope(function: Function) -> Function:
    """Run a function in the scope of the strategy."""

    def run(state: TrainingState) -> Any:
        with state.strategy.scope():
            return function(state)

    return run


def table() -> str:
    """Return the table of the documentation: the operations, grouped by verdict."""
    rows = [
        f"| {name} | {verdict.value} |"
        for verdict in Verdict
        for name, operation in OPERATIONS.items()
        if operation.verdict is verdict
    ]
    return "\n".join(["| operation | on one node alone |", "|---|---|", *rows, ""])


def create_model() -> keras.Model:
    """Return a small model with the kinds of layers that topwork uses."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.RandomFlip(seed=1),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.1, seed=1),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        keras.optimizers.Adam(1e-3, use_ema=True),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0)],
        jit_compile=False,
    )
    return model


def create_state(addresses: list[str], index: int, directory: Path) -> TrainingState:
    """Create the strategy and a model, and train a step. All nodes must call this."""
    cluster = tf.train.ClusterSpec({"worker": addresses})
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        cluster, task_type="worker", task_id=index, rpc_layer="grpc"
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
    with strategy.scope():
        model = create_model()
        model.optimizer.build(model.trainable_variables)

        @tf.function
        def step(batch: Any) -> tf.Tensor:
            return strategy.reduce("MEAN", strategy.run(model.train_step, (batch,))["loss"], axis=None)

        state = TrainingState(strategy, model, step, directory, directory / "saved.keras")
        model._symbolic_build(data_batch=state.batch)
        step(state.batch)
    model.save(state.saved)
    return state


def serve(state: TrainingState, operations: Iterable[str]) -> None:
    """Run operations by their names, without waiting for their end."""
    written = threading.Lock()

    def run(name: str) -> None:
        try:
            OPERATIONS[name].run(state)
            outcome = "ended"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}".replace("\n", " ")
        with written:
            print(state.hash(), outcome, flush=True)

    print(state.hash(), "ready", flush=True)
    for line in operations:
        threading.Thread(target=run, args=(line.rstrip("\n"),), daemon=True).start()


# The order of the operations is that of the table.


@operation("`model(x, training=False)`", Verdict.SAFE)
def call_model(state: TrainingState) -> None:
    state.model(IMAGES, training=False).numpy()


@operation("`model(x, training=False)` in the scope", Verdict.SAFE)
@in_scope
def call_model_in_scope(state: TrainingState) -> None:
    state.model(IMAGES, training=False).numpy()


@operation("`model(x, training=False)` in a `tf.function`, also with `jit_compile=True`", Verdict.SAFE)
def call_model_in_functions(state: TrainingState) -> None:
    for jit_compile in (False, True):
        tf.function(lambda x: state.model(x, training=False), jit_compile=jit_compile)(tf.constant(IMAGES)).numpy()


@operation(
    "`strategy.run` of `model(x, training=False)`, with values of `experimental_distribute_values_from_function`",
    Verdict.SAFE,
)
def run_model(state: TrainingState) -> None:
    strategy = state.strategy
    values = strategy.experimental_distribute_values_from_function(lambda context: tf.constant(IMAGES))
    call = tf.function(lambda x: strategy.run(lambda y: state.model(y, training=False), (x,)))
    strategy.experimental_local_results(call(values))[0].numpy()


@operation("gradients of a loss, in `strategy.run` or not, without applying them", Verdict.SAFE)
def compute_gradients(state: TrainingState) -> None:
    def compute(images: tf.Tensor, labels: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = state.model.loss(labels, state.model(images, training=False))
        return tape.gradient(loss, [weight.value for weight in state.model.trainable_weights])

    compute(*state.batch)
    tf.function(lambda batch: state.strategy.run(compute, batch))(state.batch)


@operation("read weights and variables of the optimizer: `get_weights`, `variable.numpy()`", Verdict.SAFE)
def read_variables(state: TrainingState) -> None:
    state.model.get_weights()
    state.hash()


@operation("`model.save`, `save_weights` and `export` outside of the scope", Verdict.SAFE)
def save(state: TrainingState) -> None:
    state.model.save(state.directory / "model.keras")
    state.model.save_weights(state.directory / "model.weights.h5")
    state.model.export(state.directory / "exported", verbose=False)


@operation("`tf.train.Checkpoint(model=model).save`", Verdict.SAFE)
def save_checkpoint(state: TrainingState) -> None:
    tf.train.Checkpoint(model=state.model).save(state.directory / "checkpoint")


@operation("`load_model` outside of the scope, then `predict`", Verdict.SAFE)
def load_model(state: TrainingState) -> None:
    keras.models.load_model(state.saved).predict(IMAGES, verbose=0)


@operation("`clone_model` and `set_weights` outside of the scope, then `predict`", Verdict.SAFE)
def clone_model(state: TrainingState) -> None:
    clone = keras.models.clone_model(state.model)
    clone.set_weights(state.model.get_weights())
    clone.predict(IMAGES, verbose=0)


@operation("create a model outside of the scope, then `fit` and `evaluate`", Verdict.SAFE)
def fit_local_model(state: TrainingState) -> None:
    model = create_model()
    model.fit(IMAGES, LABELS, batch_size=2, verbose=0)
    model.evaluate(IMAGES, LABELS, batch_size=2, verbose=0)


@operation("create a layer without variables in the scope, such as `Dense` before it is built", Verdict.SAFE)
@in_scope
def create_layer(state: TrainingState) -> None:
    keras.layers.Dense(3)


@operation("trace the training step: `get_concrete_function`", Verdict.SAFE)
@in_scope
def trace_step(state: TrainingState) -> None:
    tf.function(lambda batch: state.strategy.run(state.model.train_step, (batch,))).get_concrete_function(state.batch)


@operation("`metric.update_state` and reading a metric in `strategy.run`", Verdict.SAFE)
def update_metric_in_replica(state: TrainingState) -> None:
    metric = state.model.metrics[0]

    def update() -> tf.Tensor:
        metric.update_state(1.0)
        return metric.result()

    tf.function(lambda: state.strategy.run(update))()


@operation("`metric.update_state` and `result` of a metric that was created outside of the scope", Verdict.SAFE)
def update_local_metric(state: TrainingState) -> None:
    metric = keras.metrics.Mean()
    metric.update_state(1.0)
    assert float(metric.result()) == 1


@operation("`next` of an infinite `distribute_datasets_from_function`, `experimental_distribute_dataset`", Verdict.SAFE)
def iterate_infinite_datasets(state: TrainingState) -> None:
    next(iter(state.strategy.distribute_datasets_from_function(lambda context: state.dataset().repeat())))
    next(iter(state.strategy.experimental_distribute_dataset(state.dataset().repeat())))


@operation("iterate over a `tf.data.Dataset`, in the scope or not", Verdict.SAFE)
def iterate_dataset(state: TrainingState) -> None:
    list(state.dataset())
    with state.strategy.scope():
        list(state.dataset())


@operation("`model(x, training=True)`: seeds of dropout and augmentation, BatchNormalization statistics", Verdict.LOCAL)
def call_model_training(state: TrainingState) -> None:
    state.model(IMAGES, training=True).numpy()


@operation("`strategy.run` of `model(x, training=True)`", Verdict.LOCAL)
def run_model_training(state: TrainingState) -> None:
    call = tf.function(lambda x: state.strategy.run(lambda y: state.model(y, training=True), (x,)))
    state.strategy.experimental_local_results(call(tf.constant(IMAGES)))[0].numpy()


@operation("`variable.assign` of a weight or of a variable of the optimizer, in the scope or not", Verdict.LOCAL)
def assign(state: TrainingState) -> None:
    for variable in (state.model.trainable_variables[0], state.model.optimizer.variables[-1]):
        variable.assign(variable.numpy() + 0.5)
        with state.strategy.scope():
            variable.assign(variable.numpy() + 0.5)


@operation("`set_weights` and `load_weights`", Verdict.LOCAL)
def set_weights(state: TrainingState) -> None:
    state.model.set_weights([weight + 1 for weight in state.model.get_weights()])
    state.model.save_weights(state.directory / "set.weights.h5")
    state.model.load_weights(state.directory / "set.weights.h5")


@operation("`optimizer.learning_rate = x`", Verdict.LOCAL)
def set_learning_rate(state: TrainingState) -> None:
    state.model.optimizer.learning_rate = 0.9 * float(state.model.optimizer.learning_rate.numpy())


@operation("`optimizer.finalize_variable_values`: weights become their moving average", Verdict.LOCAL)
def finalize_variables(state: TrainingState) -> None:
    state.model.optimizer.finalize_variable_values(state.model.trainable_variables)


@operation("a training step, `optimizer.apply`", Verdict.HANGS)
@in_scope
def train_step(state: TrainingState) -> None:
    assert np.isfinite(state.step(state.batch).numpy())


@operation("a training step with another batch size, which is traced again", Verdict.HANGS)
@in_scope
def train_step_of_other_size(state: TrainingState) -> None:
    state.step(tuple(tensor[:2] for tensor in state.batch))


@operation("`strategy.reduce` of values of replicas", Verdict.HANGS)
def reduce(state: TrainingState) -> None:
    total = state.strategy.reduce("SUM", state.strategy.run(lambda: tf.constant(1.0)), axis=None)
    assert float(total) == 2, total


@operation("`strategy.gather`", Verdict.HANGS)
def gather(state: TrainingState) -> None:
    state.strategy.gather(state.strategy.run(lambda: tf.constant([1.0])), axis=0)


@operation("`model.predict`, in the scope or not: the model keeps its strategy", Verdict.HANGS)
def predict(state: TrainingState) -> None:
    state.model.predict(IMAGES, batch_size=2, verbose=0)


@operation("`model.predict_on_batch`", Verdict.HANGS)
def predict_on_batch(state: TrainingState) -> None:
    state.model.predict_on_batch(IMAGES)


@operation("`get_metrics_result`, `metric.result()`", Verdict.HANGS)
def get_metrics_result(state: TrainingState) -> None:
    state.model.get_metrics_result()


@operation("read a variable of a metric", Verdict.HANGS)
def read_metric_variable(state: TrainingState) -> None:
    state.model.metrics_variables[0].numpy()


@operation("`reset_metrics`", Verdict.HANGS)
def reset_metrics(state: TrainingState) -> None:
    state.model.reset_metrics()


@operation("assign to a variable of a metric", Verdict.HANGS)
def assign_to_metric_variable(state: TrainingState) -> None:
    state.model.metrics_variables[0].assign(0.0)


@operation("`metric.update_state` outside of `strategy.run`", Verdict.HANGS)
def update_metric(state: TrainingState) -> None:
    state.model.metrics[0].update_state(1.0)


@operation("`model.save` in the scope", Verdict.HANGS)
@in_scope
def save_in_scope(state: TrainingState) -> None:
    state.model.save(state.directory / "in_scope.keras")


@operation("`load_model` in the scope", Verdict.HANGS)
@in_scope
def load_model_in_scope(state: TrainingState) -> None:
    keras.models.load_model(state.saved)


@operation("create or build a model in the scope", Verdict.HANGS)
@in_scope
def create_model_in_scope(state: TrainingState) -> None:
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


@operation("create a variable in the scope", Verdict.HANGS)
@in_scope
def create_variable(state: TrainingState) -> None:
    keras.Variable(np.zeros(3, np.float32))


@operation("create a layer with a seed in the scope, such as `Dropout` or `RandomFlip`", Verdict.HANGS)
@in_scope
def create_dropout(state: TrainingState) -> None:
    keras.layers.Dropout(0.1)


@operation("create an optimizer in the scope", Verdict.HANGS)
@in_scope
def create_optimizer(state: TrainingState) -> None:
    keras.optimizers.Adam()


@operation("create a metric in the scope", Verdict.HANGS)
@in_scope
def create_metric(state: TrainingState) -> None:
    keras.metrics.Mean()


@operation("`model.compile` in the scope", Verdict.HANGS)
@in_scope
def compile_in_scope(state: TrainingState) -> None:
    keras.Sequential([keras.layers.Dense(1)]).compile(loss="binary_crossentropy")


@operation("iterate over a finite `distribute_datasets_from_function`, even its first batch", Verdict.HANGS)
def iterate_finite_dataset(state: TrainingState) -> None:
    next(iter(state.strategy.distribute_datasets_from_function(lambda context: state.dataset())))


@operation("iterate over a finite `experimental_distribute_dataset`, even its first batch", Verdict.HANGS)
def iterate_finite_distributed_dataset(state: TrainingState) -> None:
    next(iter(state.strategy.experimental_distribute_dataset(state.dataset())))


@operation("`model.fit`", Verdict.FAILS)
def fit(state: TrainingState) -> None:
    state.model.fit(IMAGES, LABELS, batch_size=2, verbose=0)


@operation("`model.evaluate`", Verdict.FAILS)
def evaluate(state: TrainingState) -> None:
    state.model.evaluate(IMAGES, LABELS, batch_size=2, verbose=0)


@operation("`model.test_on_batch`", Verdict.FAILS)
def test_on_batch(state: TrainingState) -> None:
    state.model.test_on_batch(IMAGES, LABELS)


# The failure can leave a node in the collective of another: this is the last operation.
@operation("`model.train_on_batch`", Verdict.FAILS)
def train_on_batch(state: TrainingState) -> None:
    state.model.train_on_batch(IMAGES, LABELS)


def main() -> None:
    """Be a node until the pipe is closed."""
    pipe, index, *addresses = sys.argv[1:]
    with Path(pipe).open() as operations, TemporaryDirectory() as directory:
        serve(create_state(addresses, int(index), Path(directory)), operations)
    os._exit(0)  # operations that hang would keep the process
