"""`make bench-cache`: compares training with and without the feature cache with a plain Keras script.

A base is first trained to classify the digits 0 to 4. Then topwork and the Keras script freeze this base and train a
new head that classifies the digits 5 to 9 as odd or even, on the same images. Each program runs in its own process, one
after the other. Reports the duration of the complete stage (topwork) or of `fit` (script), including tracing and
validation, but not the start of Python and TensorFlow. Cached augmented views have their own row, because other rows
with augmentation use new views in each epoch.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from digits import write_digits
from rich.console import Console
from rich.table import Table
from solar import JOB_TEMPLATE, link_splits, run_json

APPLICATION = "Xception"
AUGMENTATION = {"rotation": 0.05}
# Small batches: the statistics of batch normalization converge only after a few hundred steps.
BASE_SIDE = 75
BASE_BATCH = 8
BASE_CLASSES = {str(digit): (digit,) for digit in range(5)}
CLASSES = {"odd": (5, 7, 9), "even": (6, 8)}


class Benchmark:
    """Prepares the images and the base, and runs the programs."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self._directory, self._options = directory, options
        self._base_images = write_digits(directory / "base-images", BASE_CLASSES)
        self._images = write_digits(directory / "images", CLASSES)
        self._weights = directory / "base.weights.h5"
        if options.base_weights:
            shutil.copy(options.base_weights, self._weights)
        else:
            self.train_base()

    def train_base(self) -> None:
        transfer = {"train": "all", "epochs": self._options.base_epochs, "batchSize": BASE_BATCH}
        job = self.write_job("base", self._base_images, "none", transfer, AUGMENTATION, side=BASE_SIDE)
        result = self.run_stages(job, "--base-weights", self._weights)
        print(f"base: accuracy {result['accuracy']:.3f} on the digits 0 to 4", flush=True)

    def write_job(
        self,
        name: str,
        images: Path,
        weights: Any,
        transfer: dict[str, Any],
        augmentation: dict[str, Any],
        side: int = 0,
    ) -> Path:
        path = self._directory / f"{name}.yaml"
        fields = {
            "transfer": json.dumps(transfer),
            "augmentation": json.dumps(augmentation),
            "side": side or self._options.side,
        }
        path.write_text(
            JOB_TEMPLATE.format(name=name, directory=images, application=APPLICATION, weights=weights, **fields)
        )
        return path

    def run_stages(self, job: Path, *options: Any) -> dict[str, Any]:
        return run_json([sys.executable, "benchmarks/stages.py", job, self._directory / "state", *options])

    def run_topwork(self, name: str, cache: Any, augmentation: dict[str, Any]) -> dict[str, Any]:
        transfer = {"epochs": self._options.epochs, "batchSize": 32, "featureCache": cache}
        job = self.write_job(name, self._images, self._weights, transfer, augmentation)
        return self.run_stages(job, "--splits", self._directory / "splits.json")

    def run_script(self, *options: str) -> dict[str, Any]:
        split = self._directory / "split"
        if not split.exists():
            link_splits(self._images, self._directory / "splits.json", split)
        command = [sys.executable, "benchmarks/plain_keras.py", split, "--base", APPLICATION, "--side"]
        command += [self._options.side, "--weights", self._weights, "--epochs", self._options.epochs]
        return run_json([*command, "--phases", "transfer", *options])


def main() -> None:
    """Run all programs and print the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--base-epochs", type=int, default=12)
    parser.add_argument("--side", type=int, default=150)
    parser.add_argument("--base-weights", type=Path, help="use these weights instead of training a base")
    parser.add_argument(
        "--quick", action="store_true", help="run only the feature caches and the script without augmentation"
    )
    options = parser.parse_args()
    console = Console()
    table = Table(title=f"{APPLICATION} {options.side}x{options.side}, {options.epochs} epochs with a frozen base")
    for column in ("program", "augmentation", "seconds", "speedup", "test accuracy"):
        table.add_column(column, justify="left" if column in {"program", "augmentation"} else "right")
    with tempfile.TemporaryDirectory() as temporary:
        benchmark = Benchmark(Path(temporary), options)
        rotation = ("--no-flip", "--rotation", str(AUGMENTATION["rotation"]))
        views = {"use": "on", "views": min(4, options.epochs)}
        programs = [
            ("topwork, cache", "none", lambda: benchmark.run_topwork("cache", "on", {})),
            (
                f"topwork, cache with {views['views']} views",
                "rotation",
                lambda: benchmark.run_topwork("views", views, AUGMENTATION),
            ),
            ("script, no autotune", "none", lambda: benchmark.run_script("--no-flip", "--no-autotune")),
        ]
        if not options.quick:
            programs += [
                ("script, no autotune", "rotation", lambda: benchmark.run_script(*rotation, "--no-autotune")),
                ("script, autotune", "none", lambda: benchmark.run_script("--no-flip")),
                ("topwork, no cache", "none", lambda: benchmark.run_topwork("plain", "off", {})),
            ]
        measurements = []
        for name, augmentation, run in programs:
            result = run()
            seconds, accuracy = result["seconds"]["transfer"], result["accuracy"]
            measurements.append((name, augmentation, seconds, accuracy))
            details = f"{seconds:.1f} s, accuracy {accuracy:.3f} {result.get('facts', '')}"
            console.print(f"{name}, augmentation {augmentation}: {details}")
    # Compare with the fastest variant of the script; augmentation only slows it down.
    fastest = min(seconds for name, _, seconds, _ in measurements if name.startswith("script"))
    for name, augmentation, seconds, accuracy in measurements:
        table.add_row(name, augmentation, f"{seconds:.1f}", f"{fastest / seconds:.1f}", f"{accuracy:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
