"""`make bench-cache`: many frozen epochs with and without the feature cache, beside the plain Keras script.

First a base is trained to tell the digits 0 to 4 apart, so that it has learnt something. Then a head is trained on it
to tell odd from even among 5 to 9, by topwork and by the script of Keras' guide, on the same images, each contender in
a process of its own, one after the other. Seconds are those of the whole stage (topwork) and of the whole `fit`
(script), tracing and validation included, the start of Python and TensorFlow not. A cache of augmented views is another
method than a new view in each epoch, and stands in a row of its own.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from digits import digits
from rich.console import Console
from rich.table import Table
from solar import JOB, last_line, split_folders

APPLICATION = "Xception"
AUGMENTATION = {"rotation": 0.05}
# Small images and batches: statistics of batch normalization take some hundred steps to become those of the images.
BASE_SIDE = 75
BASE_BATCH = 8
BASE_CLASSES = {str(digit): (digit,) for digit in range(5)}
CLASSES = {"odd": (5, 7, 9), "even": (6, 8)}


class Bench:
    """The images, the base and the contenders."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self._known = digits(folder / "known", BASE_CLASSES)
        self._new = digits(folder / "new", CLASSES)
        self._weights = folder / "base.weights.h5"
        if options.base_weights:
            shutil.copy(options.base_weights, self._weights)
        else:
            self.train_base()

    def train_base(self) -> None:
        transfer = {"train": "all", "epochs": self._options.base_epochs, "batchSize": BASE_BATCH}
        job = self.job("base", self._known, "none", transfer, AUGMENTATION, side=BASE_SIDE)
        learnt = self.stages(job, "--base-weights", self._weights)
        print(f"base: accuracy {learnt['accuracy']:.3f} on its own digits", flush=True)

    def job(
        self, name: str, folder: Path, weights: Any, transfer: dict[str, Any], changes: dict[str, Any], side: int = 0
    ) -> Path:
        path = self._folder / f"{name}.yaml"
        words = {
            "transfer": json.dumps(transfer),
            "augmentation": json.dumps(changes),
            "side": side or self._options.side,
        }
        path.write_text(JOB.format(name=name, folder=folder, application=APPLICATION, weights=weights, **words))
        return path

    def stages(self, job: Path, *options: Any) -> dict[str, Any]:
        return last_line([sys.executable, "benchmarks/stages.py", job, self._folder / "state", *options])

    def topwork(self, name: str, cache: Any, changes: dict[str, Any]) -> dict[str, Any]:
        transfer = {"epochs": self._options.epochs, "batchSize": 32, "featureCache": cache}
        job = self.job(name, self._new, self._weights, transfer, changes)
        return self.stages(job, "--lists", self._folder / "lists.json")

    def script(self, *options: str) -> dict[str, Any]:
        split = self._folder / "split"
        if not split.exists():
            split_folders(self._new, self._folder / "lists.json", split)
        command = [sys.executable, "benchmarks/plain_keras.py", split, "--base", APPLICATION, "--side"]
        command += [self._options.side, "--weights", self._weights, "--epochs", self._options.epochs]
        return last_line([*command, "--phases", "transfer", *options])


def main() -> None:
    """Run all contenders and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--base-epochs", type=int, default=12)
    parser.add_argument("--side", type=int, default=150)
    parser.add_argument("--base-weights", type=Path, help="take these instead of training a base")
    parser.add_argument("--quick", action="store_true", help="beside both caches only the script without augmentation")
    options = parser.parse_args()
    console = Console()
    table = Table(title=f"{APPLICATION} {options.side}x{options.side}, {options.epochs} epochs with the base frozen")
    for column in ("contender", "augmentation", "seconds", "times faster", "test accuracy"):
        table.add_column(column, justify="left" if column in {"contender", "augmentation"} else "right")
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), options)
        rotation = ("--no-flip", "--rotation", str(AUGMENTATION["rotation"]))
        views = {"use": "on", "views": min(4, options.epochs)}
        contenders = [
            ("topwork, cache", "none", lambda: bench.topwork("cache", "on", {})),
            (
                f"topwork, cache of {views['views']} views",
                "rotation",
                lambda: bench.topwork("views", views, AUGMENTATION),
            ),
            ("script, autotuner off", "none", lambda: bench.script("--no-flip", "--no-autotune")),
        ]
        if not options.quick:
            contenders += [
                ("script, autotuner off", "rotation", lambda: bench.script(*rotation, "--no-autotune")),
                ("script, autotuner on", "none", lambda: bench.script("--no-flip")),
                ("topwork, no cache", "none", lambda: bench.topwork("plain", "off", {})),
            ]
        measured = []
        for name, changes, run in contenders:
            result = run()
            measured.append((name, changes, result["seconds"]["transfer"], result["accuracy"]))
            told = f"{measured[-1][2]:.1f} s, accuracy {measured[-1][3]:.3f}"
            console.print(f"{name}, augmentation {changes}: {told} {result.get('facts', '')}")
    # The fastest script is what a user would have; augmentation only slows it down.
    fastest = min(row[2] for row in measured if row[0].startswith("script"))
    for name, changes, seconds, accuracy in measured:
        table.add_row(name, changes, f"{seconds:.1f}", f"{fastest / seconds:.1f}", f"{accuracy:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
