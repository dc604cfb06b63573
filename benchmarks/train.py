"""`make bench-train`: epochs with all layers trained, beside a plain Keras script and a plain PyTorch script with timm.

topwork trains with `precision: auto`, the Keras script in float32 as the guide has it, the PyTorch script in bfloat16.
All see the same images, flipped at random, in batches of 32, from random weights; each runs in a process of its own,
one after the other. Seconds are those of the training steps of the second epoch: the first one traces and compiles.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from solar import JOB, last_line, pictures, split_folders

TORCH = Path(".venv-torch/bin/python")
# Model of keras.applications, side of the images in pixels, the same model in timm.
MODELS = (("Xception", 150, "legacy_xception"), ("ResNet50", 224, "resnet50"))
EPOCHS = 2


def main() -> None:
    """Run all contenders on each model and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", type=Path, default=TORCH, help="Python with torch, torchvision and timm")
    parser.add_argument("--models", nargs="+", default=[name for name, *_ in MODELS])
    options = parser.parse_args()
    table = Table(title="One epoch, all layers trained, after the first")
    for column in ("model", "contender", "seconds", "images a second", "times faster"):
        table.add_column(column, justify="left" if column in {"model", "contender"} else "right")
    for model in (one for one in MODELS if one[0] in options.models):
        with tempfile.TemporaryDirectory() as temporary:
            images, seconds = measured(Path(temporary), *model, options.torch)
        for contender, taken in seconds.items():
            row = f"{taken:.1f}", f"{images / taken:.1f}", f"{seconds['plain Keras, float32'] / taken:.2f}"
            table.add_row(f"{model[0]} {model[1]}x{model[1]}", contender, *row)
    Console().print(table)


def measured(folder: Path, name: str, side: int, timm: str, torch: Path) -> tuple[int, dict[str, float]]:
    """Run the contenders one after the other.

    Returns:
        Images an epoch, and the seconds of the second epoch of each.
    """
    shown = pictures(folder / "pictures", ("poly",))
    transfer = {"train": "all", "epochs": EPOCHS, "batchSize": 32}
    words = {"transfer": json.dumps(transfer), "augmentation": '{"flip": "horizontal"}', "side": side}
    job = folder / "job.yaml"
    job.write_text(JOB.format(name="train", folder=shown, application=name, weights="none", **words))
    lists = folder / "lists.json"
    own = last_line([sys.executable, "benchmarks/stages.py", job, folder / "state", "--lists", lists])
    split = split_folders(shown, lists, folder / "split")
    sizes: list[Any] = ["--base", name, "--side", side, "--epochs", EPOCHS, "--phases", "all", "--no-autotune"]
    plain = last_line([sys.executable, "benchmarks/plain_keras.py", split, *sizes])
    seconds = {
        "topwork, precision: auto": own["epochs"][-1]["seconds"],
        "plain Keras, float32": plain["epochs"]["all"][-1],
    }
    if torch.exists():
        script = [torch, "benchmarks/timm_torch.py", split, "--base", timm, "--side", side, "--epochs", EPOCHS]
        seconds["PyTorch and timm, bfloat16"] = last_line(script)["epochs"]["all"][-1]
    images = len(json.loads(lists.read_text())["train"])
    return images - images % 32, seconds


if __name__ == "__main__":
    main()
