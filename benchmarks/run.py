"""`make bench`: compares topwork with a plain Keras script on the same images.

Reports the duration of the training steps of an epoch, without validation and without the first epoch of each phase,
which includes tracing. Each program runs in its own process, one after the other. The images are those of the demo.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from solar import JOB_TEMPLATE, copy_images, link_splits, run_json

SIDE, EPOCHS, BASE = 96, 4, "MobileNetV2"


def main() -> None:
    """Run all programs and print the results."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        topwork = topwork_seconds(directory)
        split = link_splits(directory / "images", directory / "splits.json", directory / "split")
        on, off = keras_seconds(split), keras_seconds(split, "--no-autotune")
    table = Table(title=f"{BASE} {SIDE}x{SIDE}, batch 32: median seconds per epoch, without the first")
    for column in (
        "phase",
        "topwork",
        "plain Keras, autotune",
        "plain Keras, no autotune",
        "ratio",
        "ratio, no autotune",
    ):
        table.add_column(column, justify="right")
    for phase, seconds in topwork.items():
        own, *others = (statistics.median(epochs[1:]) for epochs in (seconds, on[phase], off[phase]))
        table.add_row(phase, *(f"{value:.2f}" for value in (own, *others, *(other / own for other in others))))
    console = Console()
    console.print(table)
    console.print(f"topwork validate: {validate_seconds():.2f} s of CPU")
    metrics = run_json([sys.executable, "benchmarks/metrics.py"])
    for name, share in metrics["shares"].items():
        console.print(f"metrics: {metrics['recording'] * 1e6:.0f} us per step, {share:.2%} of a step of {name}")
    console.print(f"metrics: {metrics['scrape'] * 1e3:.1f} ms and {metrics['bytes']} bytes per scrape")


def topwork_seconds(directory: Path) -> dict[str, list[float]]:
    """Return the seconds of each epoch by stage; leaves the images and splits.json in the directory."""
    job = directory / "job.yaml"
    transfer = json.dumps({"epochs": EPOCHS, "batchSize": 32, "featureCache": "off"})
    text = JOB_TEMPLATE.format(
        name="bench",
        directory=copy_images(directory / "images"),
        application=BASE,
        weights="none",
        augmentation='{"flip": "horizontal"}',
        transfer=transfer,
        side=SIDE,
    )
    job.write_text(f"{text}  fineTune: {{epochs: {EPOCHS}, optimizer: {{learningRate: 1.0e-5}}}}\n")
    result = run_json(
        [sys.executable, "benchmarks/stages.py", job, directory / "state", "--splits", directory / "splits.json"]
    )
    seconds: dict[str, list[float]] = {}
    for row in result["epochs"]:
        seconds.setdefault(row["stage"], []).append(row["seconds"])
    return seconds


def keras_seconds(split: Path, *options: str) -> dict[str, list[float]]:
    """Return the seconds of each epoch of the plain Keras script, by phase."""
    command = [sys.executable, "benchmarks/plain_keras.py", split, "--base", BASE, "--side", SIDE, "--epochs", EPOCHS]
    return run_json([*command, *options])["epochs"]


def validate_seconds() -> float:
    """Return the CPU seconds of `topwork validate`, the minimum of five runs."""
    measured = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "topwork", "validate", "examples/solar-scratch.yaml"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        measured.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        time.sleep(0.1)
    return min(measured)


if __name__ == "__main__":
    main()
