"""A node of `benchmarks/scaling.py`: measures collectives and training steps together with the other nodes.

Usage: `python benchmarks/scaling_node.py INDEX BYTES_PER_PACK ADDRESS…`. The process reads a JSON object per line from
standard input, with the name of a measurement and its arguments, and writes the seconds of each repetition as JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

WIDTH = 512
INPUTS = 64


def connect(index: int, bytes_per_pack: int, addresses: list[str]) -> tf.distribute.Strategy:
    """Create the strategy; returns when all nodes are connected."""
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": addresses}), task_type="worker", task_id=index, rpc_layer="grpc"
    )
    options = tf.distribute.experimental.CommunicationOptions(
        bytes_per_pack=bytes_per_pack, implementation=tf.distribute.experimental.CommunicationImplementation.RING
    )
    return tf.distribute.MultiWorkerMirroredStrategy(resolver, communication_options=options)


class Measurements:
    """The measurements; all nodes must run the same ones in the same order."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        self._steps: dict[tuple[int, int, bool], Callable[[], Any]] = {}
        self._barrier = self._all_reduce_function(1)

    def _all_reduce_function(self, floats: int) -> Callable[[], Any]:
        value = tf.ones([floats])

        def reduce() -> tf.Tensor:
            return tf.distribute.get_replica_context().all_reduce("SUM", value)

        return tf.function(lambda: self._strategy.run(reduce)[:1])

    def _time(self, function: Callable[[], Any], repeats: int) -> list[float]:
        """Return the seconds of each call, after one that is not counted. Every call starts on all nodes together."""
        seconds = []
        for _ in range(repeats + 1):
            self._barrier().numpy()
            start = time.perf_counter()
            function().numpy()
            seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def all_reduce(self, floats: int, repeats: int) -> list[float]:
        """Measure an all-reduce of float32 values."""
        return self._time(self._all_reduce_function(floats), repeats)

    def create_variables(self, count: int, repeats: int) -> list[float]:
        """Measure the creation of a variable in the scope: the mean of `count`."""
        seconds = []
        for _ in range(repeats):
            self._barrier().numpy()
            start = time.perf_counter()
            with self._strategy.scope():
                variables = [keras.Variable(np.zeros(16, np.float32)) for _ in range(count)]
            assert variables[-1].numpy()[0] == 0
            seconds.append((time.perf_counter() - start) / count)
        return seconds

    def train(self, layers: int, batch_size: int, together: bool, repeats: int) -> list[float]:
        """Measure a training step of dense layers, with or without the other nodes."""
        key = layers, batch_size, together
        if key not in self._steps:
            self._steps[key] = self._training_step(*key)
        return self._time(self._steps[key], repeats)

    def _training_step(self, layers: int, batch_size: int, together: bool) -> Callable[[], Any]:
        strategy = self._strategy if together else tf.distribute.get_strategy()
        with strategy.scope():
            hidden = [keras.layers.Dense(WIDTH, activation="relu") for _ in range(layers)]
            model = keras.Sequential([keras.Input((WIDTH,)), *hidden, keras.layers.Dense(1)])
            model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=False)
            model.optimizer.build(model.trainable_variables)
            batch = (tf.ones([batch_size, WIDTH]), tf.ones([batch_size, 1]))
            model._symbolic_build(data_batch=batch)

        def step() -> tf.Tensor:
            logs = strategy.run(model.train_step, (batch,))
            return strategy.experimental_local_results(logs["loss"])[0]

        return tf.function(step)


def main() -> None:
    """Measure what standard input asks for, until it is closed."""
    index, bytes_per_pack, *addresses = sys.argv[1:]
    start = time.perf_counter()
    measurements = Measurements(connect(int(index), int(bytes_per_pack), addresses))
    print(json.dumps([time.perf_counter() - start]), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(measurements, request.pop("measure"))(**request)), flush=True)
    os._exit(0)  # a normal exit waits for the other nodes


if __name__ == "__main__":
    main()
