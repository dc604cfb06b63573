"""Part of `make bench`: the overhead of recording metrics per training step, and the cost of a scrape.

The overhead of `TrainStep` (timers, counters, histogram, progress, loss check) is the duration of a step that computes
nothing, minus that of the same loop without `TrainStep`. It is compared with the duration of two real steps: training
a head on cached features, the fastest step that topwork runs, and training a small base. The last line of the output
is JSON.
"""

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest

from topwork.cli.output.progress import NoProgress
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.clients.prometheus.metrics import Metrics
from topwork.training.checkpointing.train_state import TrainState
from topwork.training.train_step import TrainStep
from topwork.workspace import Workspace

STEPS, SCRAPES, ROUNDS = 20_000, 200, 5
SCRAPE_SECONDS = 15.0
BATCH, FEATURES, SIDE = 32, 1280, 96


class EndlessEpoch:
    """Replaces a Trainer, with an epoch that never ends."""

    steps_per_epoch = 10**9
    batch_size = BATCH

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.state = TrainState()

    def checkpoint_is_due(self) -> bool:
        return False


def create_metrics() -> Metrics:
    """Create the metrics of a training stage."""
    metrics = Metrics()
    metrics.start_job(job="bench", run="bench-12345678", stage="transfer", version="0")
    metrics.set_evaluation("train", {"accuracy": 0.5, "loss": 0.5})
    metrics.set_evaluation("validation", {"accuracy": 0.5, "loss": 0.5})
    metrics.set_planned_epochs("transfer", 10)
    metrics.set_epoch("transfer", 1)
    return metrics


def recording_seconds(metrics: Metrics, loss: Any) -> float:
    """Return the recording overhead per step in seconds, the minimum of several rounds."""

    def train(_batch: Any, _requests: Any) -> Any:
        return loss

    workspace = Workspace(None, metrics, NoProgress(), Path())  # type: ignore[arg-type] # nothing is stored
    with workspace.track("bench", None) as tracker:
        step = TrainStep(train, EndlessEpoch(workspace), tracker)  # type: ignore[arg-type] # has all attributes that TrainStep uses
        pairs = [(mean_seconds(step), mean_seconds(lambda batches: train(next(batches), None))) for _ in range(ROUNDS)]
    return min(recorded for recorded, _ in pairs) - min(plain for _, plain in pairs)


def mean_seconds(step: Callable[[Iterator[Any]], Any]) -> float:
    """Return the mean duration of a step in seconds."""
    batches = repeat(None)
    start = time.perf_counter()
    for _ in range(STEPS):
        step(batches)
    return (time.perf_counter() - start) / STEPS


def step_seconds(model: Any, shape: tuple[int, ...], steps: int) -> float:
    """Return the median duration of a training step on random input in seconds, without the first steps."""
    import numpy as np
    import tensorflow as tf

    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    model.make_train_function()
    random = np.random.default_rng(0)
    images = random.random((BATCH, *shape), dtype=np.float32)
    labels = random.integers(0, 2, BATCH)
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    durations = []
    for _ in range(steps):
        start = time.perf_counter()
        float(model.train_function(batches)["loss"])
        durations.append(time.perf_counter() - start)
    return sorted(durations[3:])[(steps - 3) // 2]


def measure_scrape(metrics: Metrics) -> tuple[float, int]:
    """Return the mean CPU seconds of a scrape, and the size of the page in bytes."""
    start = time.process_time()
    for _ in range(SCRAPES):
        page = generate_latest(metrics.labeled_registry)
    return (time.process_time() - start) / SCRAPES, len(page)


def measure_memory() -> int:
    """Return the memory of all series in bytes."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    metrics = create_metrics()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    del metrics
    return used


def main() -> None:
    """Measure and print the results."""
    with quiet_tensorflow_import():
        import keras
        import tensorflow as tf
    metrics = create_metrics()
    recording = recording_seconds(metrics, tf.constant([0.5]))
    scraping, size = measure_scrape(metrics)
    head = keras.Sequential([keras.layers.Input((FEATURES,)), keras.layers.Dense(2, activation="softmax")])
    base = keras.applications.MobileNetV2(input_shape=(SIDE, SIDE, 3), weights=None, classes=2)
    steps = {
        "head on cached features": step_seconds(head, (FEATURES,), 300),
        f"MobileNetV2 {SIDE}x{SIDE}": step_seconds(base, (SIDE, SIDE, 3), 15),
    }
    print(f"recording takes {recording * 1e6:.1f} us per step")
    for name, seconds in steps.items():
        print(
            f"  {name}, batch {BATCH}: {seconds * 1e3:.2f} ms per step, of which recording is {recording / seconds:.3%}"
        )
    print(f"a scrape takes {scraping * 1e3:.2f} ms for {size} bytes: {scraping / SCRAPE_SECONDS:.4%} of a core")
    print(f"all series use {measure_memory() / 1024:.0f} KiB")
    shares = {name: recording / seconds for name, seconds in steps.items()}
    print(json.dumps({"recording": recording, "shares": shares, "scrape": scraping, "bytes": size}))


if __name__ == "__main__":
    main()
