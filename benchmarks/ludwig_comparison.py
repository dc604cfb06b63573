"""`make bench-ludwig`: a search of topwork and one of Ludwig on the same processor cores.

Both train the same convolutional network from random weights on 1,797 images of digits of 32x32 pixels, with the same
images in each split and the same space. Ludwig gets fewer trials, because a limit of its time ends in an error. Times
include the start of Python, of the frameworks and of Ray, and the preparation of the images. The best trial is the one
with the lowest loss on the validation split; its accuracy on the test split is reported.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from digits import write_digits
from rich.console import Console
from rich.table import Table
from search import SPACE, run_topwork, write_spec
from solar import run_json

LUDWIG_PYTHON = Path(".venv-ludwig/bin/python")


def main() -> None:
    """Run both searches with each seed, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ludwig", type=Path, default=LUDWIG_PYTHON, help="Python interpreter with Ludwig and Ray")
    parser.add_argument("--trials", type=int, default=16, help="trials of topwork [default: %(default)s]")
    parser.add_argument("--ludwig-trials", type=int, default=4, help="trials of Ludwig [default: %(default)s]")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of a trial [default: %(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions with other seeds [default: %(default)s]")
    options = parser.parse_args()
    table = Table("seed", "program", "seconds", "trials", "best validation loss", "its test accuracy")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        images = write_splits(directory / "images")
        for seed in range(options.seeds):
            own = search(directory / f"topwork-{seed}", images, options, seed)
            theirs = search_with_ludwig(directory / f"ludwig-{seed}", images, options, seed)
            for program, values in (("topwork", own), ("Ludwig", theirs)):
                cells = f"{values['seconds']:.0f}", f"{values['trials']}", f"{values['loss']:.4f}"
                table.add_row(f"{seed}", program, *cells, f"{values['accuracy']:.4f}")
    Console().print(table)


def write_splits(directory: Path) -> Path:
    """Write the images of digits to one directory per split: of each class, three fifths, one fifth and one fifth."""
    complete = write_digits(directory / "all", {str(digit): (digit,) for digit in range(10)})
    for label in complete.iterdir():
        for number, file in enumerate(sorted(label.iterdir())):
            target = directory / ("train", "train", "train", "validation", "test")[number % 5] / label.name
            target.mkdir(parents=True, exist_ok=True)
            file.rename(target / file.name)
    shutil.rmtree(complete)
    return directory


def search(directory: Path, images: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Search with topwork, which also publishes the best trial; return what it found, and the seconds."""
    directory.mkdir()
    template = {
        "storage": "s3://bench/topwork",
        "dataset": {"source": {"folder": {"uri": str(images)}}, "splits": "auto", "imageSize": [32, 32]},
        "model": {"base": {"cnn": {"filters": [16, 32, 64], "kernelSize": 3}}, "head": {"pooling": "flatten"}},
        "transfer": {"train": "all", "epochs": options.epochs, "batchSize": 32},
        "evaluate": {"metrics": ["accuracy"]},
        "publish": {"formats": ["keras"]},
        "compute": {"gpus": 0},
    }
    spec = {"template": template, "space": SPACE, "metric": "loss", "trials": options.trials, "seed": seed}
    spec |= {"sampler": "tpe", "pruner": "asha"}
    file, state = write_spec(directory / "search.yaml", "TransferSearch", "digits", spec), ("--state", directory)
    started = time.monotonic()
    run_topwork("search", file, *state)
    seconds = time.monotonic() - started
    shown = json.loads(run_topwork("search", "show", file, "--json", *state))
    model = json.loads(run_topwork("models", "show", template["storage"], "digits", "--json", *state))
    values = {"seconds": seconds, "trials": len(shown["trials"]), "loss": shown["trials"][shown["best"]]["value"]}
    return values | {"accuracy": model["metrics"]["accuracy"]}


def search_with_ludwig(directory: Path, images: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Search with Ludwig, and return what it found."""
    directory.mkdir()
    script = Path("benchmarks/ludwig_search.py").absolute()
    command = [options.ludwig.absolute(), script, images, directory, "--seed", seed]
    # It writes a lock file to the current directory.
    return dict(run_json([*command, "--epochs", options.epochs, "--trials", options.ludwig_trials], cwd=directory))


if __name__ == "__main__":
    main()
