"""`make bench`, its part on metrics: what a training step records and what a scrape costs, beside the steps themselves.

What is around a step (`TrainStep`: clocks, counters, histogram, progress, the look at the loss) is timed
with a step that computes nothing, less the same loop without it. That is set against two real steps: the fastest that
topwork runs, a head on kept features, and one of a small base. Ends with one JSON line.
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
from topwork.training.train_state import TrainState
from topwork.training.trainer import TrainStep
from topwork.workspace import Workspace

STEPS, SCRAPES, ROUNDS = 20_000, 200, 5
SCRAPE_SECONDS = 15.0
BATCH, FEATURES, SIDE = 32, 1280, 96


class EndlessEpoch:
    """Stands in for a Trainer whose epoch never ends."""

    steps_per_epoch = 10**9
    batch_size = BATCH

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.state = TrainState()

    def checkpoint_is_due(self) -> bool:
        return False


def described() -> Metrics:
    """Metrics as a training stage has them."""
    metrics = Metrics()
    metrics.start_job(job="bench", run="bench-12345678", stage="transfer", version="0")
    metrics.set_evaluation("train", {"accuracy": 0.5, "loss": 0.5})
    metrics.set_evaluation("validation", {"accuracy": 0.5, "loss": 0.5})
    metrics.set_planned_epochs("transfer", 10)
    metrics.set_epoch("transfer", 1)
    return metrics


def recording_seconds(metrics: Metrics, loss: Any) -> float:
    """Seconds that a step takes more with all that is recorded around it, the least of some rounds."""

    def train(batches: Iterator[Any]) -> dict[str, Any]:
        next(batches)
        return {"loss": loss}

    workspace = Workspace(None, metrics, NoProgress(), Path())  # type: ignore[arg-type] # nothing is stored
    with workspace.track("bench", None) as tracker:
        recorded = TrainStep(train, EndlessEpoch(workspace), tracker)  # type: ignore[arg-type] # all that a step uses
        pairs = [(each(recorded), each(lambda batches: train(iter((next(batches),))))) for _ in range(ROUNDS)]
    return min(with_it for with_it, _ in pairs) - min(without for _, without in pairs)


def each(step: Callable[[Iterator[Any]], Any]) -> float:
    """Seconds of a step, in the mean."""
    batches = repeat(None)
    began = time.perf_counter()
    for _ in range(STEPS):
        step(batches)
    return (time.perf_counter() - began) / STEPS


def step_seconds(model: Any, shape: tuple[int, ...], steps: int) -> float:
    """Seconds of a real training step on random input, the median after the first ones."""
    import numpy as np
    import tensorflow as tf

    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    model.make_train_function()
    random = np.random.default_rng(0)
    images = random.random((BATCH, *shape), dtype=np.float32)
    labels = random.integers(0, 2, BATCH)
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    measured = []
    for _ in range(steps):
        began = time.perf_counter()
        float(model.train_function(batches)["loss"])
        measured.append(time.perf_counter() - began)
    return sorted(measured[3:])[(steps - 3) // 2]


def scrape(metrics: Metrics) -> tuple[float, int]:
    """Processor seconds of a scrape, in the mean, and bytes of the page."""
    began = time.process_time()
    for _ in range(SCRAPES):
        page = generate_latest(metrics.labeled_registry)
    return (time.process_time() - began) / SCRAPES, len(page)


def kept_bytes() -> int:
    """Memory of all series."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    metrics = described()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    del metrics
    return used


def main() -> None:
    """Measure, and print the table."""
    with quiet_tensorflow_import():
        import keras
        import tensorflow as tf
    metrics = described()
    recording = recording_seconds(metrics, tf.constant(0.5))
    scraping, size = scrape(metrics)
    head = keras.Sequential([keras.layers.Input((FEATURES,)), keras.layers.Dense(2, activation="softmax")])
    base = keras.applications.MobileNetV2(input_shape=(SIDE, SIDE, 3), weights=None, classes=2)
    steps = {
        "head on kept features": step_seconds(head, (FEATURES,), 300),
        f"MobileNetV2 {SIDE}x{SIDE}": step_seconds(base, (SIDE, SIDE, 3), 15),
    }
    print(f"a step records in {recording * 1e6:.1f} us")
    for name, seconds in steps.items():
        print(
            f"  {name}, batch {BATCH}: a step takes {seconds * 1e3:.2f} ms, recording {recording / seconds:.3%} of it"
        )
    print(f"a scrape takes {scraping * 1e3:.2f} ms for {size} bytes: {scraping / SCRAPE_SECONDS:.4%} of a core")
    print(f"all series together take {kept_bytes() / 1024:.0f} KiB")
    shares = {name: recording / seconds for name, seconds in steps.items()}
    print(json.dumps({"recording": recording, "shares": shares, "scrape": scraping, "bytes": size}))


if __name__ == "__main__":
    main()
