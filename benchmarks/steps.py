"""Training steps on the CPU under other settings of the process, each as a ratio to the settings of topwork.

    python benchmarks/steps.py [--models EfficientNetB0:160:20 ResNet50:224:16] [--steps 8] [--rounds 3]

All layers of a model with random weights are trained in float32 with Adam; BatchNormalization layers stay in inference
mode, as topwork keeps those of a pretrained base. Each measurement is a new process, and they take turns within a
round: a ratio compares a process with that of topwork in the same round, so that other load on the machine affects
both. Above 1, the other setting is faster. jemalloc needs libjemalloc.so.2 (on Debian or Ubuntu, apt-get install
libjemalloc2).

With `--fit`, the step function of topwork is compared with that of Keras' `fit` instead, without the callbacks of
`fit`: both train the same model in one process and take turns. On a busy machine, only the ratio of the processor time
means something.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

JEMALLOC = Path("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2")


@dataclass(frozen=True)
class Setting:
    """A setting to measure.

    Attributes:
        name: Name in the table.
        environment: Environment variables of the process.
        keeps_memory: Whether glibc keeps freed memory, as in topwork.
        jit: Whether XLA compiles the step.
        updates: Whether the optimizer runs; without it, the ratio is the bound of any faster optimizer.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    keeps_memory: bool = True
    jit: bool = False
    updates: bool = True


SETTINGS = (
    Setting("topwork"),
    Setting("glibc returns freed memory (its default)", keeps_memory=False),
    Setting("jemalloc", {"LD_PRELOAD": str(JEMALLOC)}, keeps_memory=False),
    Setting("huge pages (glibc.malloc.hugetlb=1)", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    Setting("one thread between operations", {"TF_NUM_INTEROP_THREADS": "1"}),
    Setting("XLA", jit=True),
    Setting("without oneDNN", {"TF_ENABLE_ONEDNN_OPTS": "0"}),
    Setting("without optimizer", updates=False),
)


def run_steps(name: str, side: int, batch_size: int, steps: int, setting: Setting) -> float:
    """Return the seconds of a training step in this process, after two steps that trace and warm up."""
    from topwork.keras_import import import_keras

    import_keras()
    import keras
    import numpy as np
    import tensorflow as tf

    from topwork.training.memory_allocation import keep_freed_memory

    if setting.keeps_memory:
        keep_freed_memory()
    shape = (side, side, 3)
    base = getattr(keras.applications, name)(weights=None, include_top=False, input_shape=shape, pooling="avg")
    model = keras.Model(base.input, keras.layers.Dense(1)(base.output))
    for layer in model.layers:
        layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)
    loss, optimizer = keras.losses.BinaryCrossentropy(from_logits=True), keras.optimizers.Adam(1e-4)
    random = np.random.default_rng(0)
    images = tf.constant(random.integers(0, 256, (batch_size, *shape)).astype(np.float32))
    labels = tf.constant(random.integers(0, 2, (batch_size, 1)).astype(np.float32))
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=setting.jit)
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        gradients = tape.gradient(value, model.trainable_weights)
        if setting.updates:
            optimizer.apply(gradients, model.trainable_weights)
            return value
        return value + tf.add_n([tf.reduce_sum(gradient) for gradient in gradients])

    for _ in range(2):
        step().numpy()
    start = time.perf_counter()
    for _ in range(steps):
        step().numpy()
    return (time.perf_counter() - start) / steps


def build_and_load(name: str, side: int, batch_size: int) -> tuple[Any, tuple[Any, ...]]:
    """Return a compiled model and a batch of random images, one-hot labels and weights."""
    import keras
    import numpy as np
    import tensorflow as tf

    shape: tuple[int, ...] = (side, side, 3)
    if name == "head":
        model = keras.Sequential([keras.Input((side,)), keras.layers.Dense(1)])
        shape = (side,)
    else:
        base = getattr(keras.applications, name)(weights=None, include_top=False, input_shape=shape, pooling="avg")
        model = keras.Model(base.input, keras.layers.Dense(1)(base.output))
    for layer in model.layers:
        layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)
    loss, metrics = keras.losses.BinaryCrossentropy(from_logits=True), [keras.metrics.BinaryAccuracy()]
    model.compile(optimizer=keras.optimizers.Adam(1e-4), loss=loss, metrics=metrics, jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (batch_size, *shape)).astype(np.float32)
    labels = random.integers(0, 2, (batch_size, 1)).astype(np.float32)
    return model, tuple(tf.constant(part) for part in (images, labels, np.ones(batch_size, np.float32)))


def compare_with_fit(name: str, side: int, batch_size: int, steps: int, rounds: int) -> list[tuple[float, float]]:
    """Return the time of the steps of `fit` relative to those of topwork in each round: elapsed and processor time."""
    from topwork.keras_import import import_keras

    import_keras()
    import tensorflow as tf

    from topwork.training.train_step import make_step_function

    model, batch = build_and_load(name, side, batch_size)
    own, none = make_step_function(model), tf.zeros(0)
    model.make_train_function()

    def run_own() -> float:
        return float(own(batch, none).numpy()[0])

    def run_keras() -> float:
        return float(model.train_function(iter((batch,)))["loss"])

    def seconds(step: Callable[[], float]) -> tuple[float, float]:
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        return time.perf_counter() - start, time.process_time() - cpu_start

    run_own()
    run_keras()
    ratios = []
    for number in range(rounds):
        order = (run_own, run_keras) if number % 2 else (run_keras, run_own)
        measured = {step: seconds(step) for step in order}
        elapsed, cpu = (fit / own for fit, own in zip(measured[run_keras], measured[run_own], strict=True))
        ratios.append((elapsed, cpu))
    return ratios


def print_comparison_with_fit(models: list[str], steps: int, rounds: int) -> None:
    """Print the ratios of all models as a table."""
    table = Table(
        "model", "elapsed time, median (range)", "processor time", title="fit / topwork, above 1: fit is slower"
    )
    for model in models:
        name, side, batch_size = model.split(":")
        ratios = zip(*compare_with_fit(name, int(side), int(batch_size), steps, rounds), strict=True)
        table.add_row(model, *(f"{statistics.median(of):.3f} ({min(of):.3f} to {max(of):.3f})" for of in ratios))
    Console().print(table)


def measure(model: str, steps: int, index: int) -> float:
    """Run the steps with a setting in a new process; not a number if that is impossible."""
    command = [sys.executable, __file__, "--models", model, "--steps", str(steps), "--run", str(index)]
    environment = os.environ | SETTINGS[index].environment
    completed = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if completed.returncode:
        sys.stderr.write(completed.stderr[-2000:])
        return float("nan")
    return float(completed.stdout.splitlines()[-1])


def main() -> None:
    """Measure all settings and print a table, or run one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["EfficientNetB0:160:20", "ResNet50:224:16"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fit", action="store_true", help="compare with fit; head:FEATURES:BATCH is a dense layer")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit:
        print_comparison_with_fit(options.models, options.steps, options.rounds)
        return
    if options.run is not None:
        name, side, batch_size = options.models[0].split(":")
        print(run_steps(name, int(side), int(batch_size), options.steps, SETTINGS[options.run]))
        return
    available = [i for i, setting in enumerate(SETTINGS) if setting.name != "jemalloc" or JEMALLOC.exists()]
    for model in options.models:
        rounds = [{i: measure(model, options.steps, i) for i in available} for _ in range(options.rounds)]
        table = Table("setting", "seconds per step", "ratio, median (range)", title=model)
        for i in available:
            ratios = [seconds[0] / seconds[i] for seconds in rounds]
            table.add_row(
                SETTINGS[i].name,
                f"{statistics.median(seconds[i] for seconds in rounds):.2f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            )
        Console().print(table)


if __name__ == "__main__":
    main()
