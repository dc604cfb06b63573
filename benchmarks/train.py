"""`make bench-train`: compares training of all layers with a plain Keras script, and a PyTorch script with timm.

topwork uses `precision: auto`, the Keras script float32 as in the guide, and the PyTorch script bfloat16. All programs
train on the same images with random flips, in batches of 32, from random weights. Each runs in its own process, one
after the other. Reports the duration of the training steps of the second epoch, because the first one includes tracing
and compilation.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from solar import JOB_TEMPLATE, copy_images, link_splits, run_json

TORCH_PYTHON = Path(".venv-torch/bin/python")
# Model in keras.applications, height and width of the images in pixels, the same model in timm.
MODELS = (("Xception", 150, "legacy_xception"), ("ResNet50", 224, "resnet50"))
EPOCHS = 2


def main() -> None:
    """Run all programs with each model and print the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--torch", type=Path, default=TORCH_PYTHON, help="Python interpreter with torch, torchvision and timm"
    )
    parser.add_argument("--models", nargs="+", default=[name for name, *_ in MODELS])
    options = parser.parse_args()
    table = Table(title="Second epoch, all layers trainable")
    for column in ("model", "program", "seconds", "images per second", "speedup"):
        table.add_column(column, justify="left" if column in {"model", "program"} else "right")
    for model in (model for model in MODELS if model[0] in options.models):
        with tempfile.TemporaryDirectory() as temporary:
            images, seconds = measure(Path(temporary), *model, options.torch)
        for program, duration in seconds.items():
            row = f"{duration:.1f}", f"{images / duration:.1f}", f"{seconds['plain Keras, float32'] / duration:.2f}"
            table.add_row(f"{model[0]} {model[1]}x{model[1]}", program, *row)
    Console().print(table)


def measure(directory: Path, name: str, side: int, timm: str, torch: Path) -> tuple[int, dict[str, float]]:
    """Run all programs with one model.

    Returns:
        Images per epoch, and the seconds of the second epoch by program.
    """
    images = copy_images(directory / "images", ("poly",))
    transfer = {"train": "all", "epochs": EPOCHS, "batchSize": 32}
    fields = {"transfer": json.dumps(transfer), "augmentation": '{"flip": "horizontal"}', "side": side}
    job = directory / "job.yaml"
    job.write_text(JOB_TEMPLATE.format(name="train", directory=images, application=name, weights="none", **fields))
    splits = directory / "splits.json"
    topwork_result = run_json([sys.executable, "benchmarks/stages.py", job, directory / "state", "--splits", splits])
    split = link_splits(images, splits, directory / "split")
    options: list[Any] = ["--base", name, "--side", side, "--epochs", EPOCHS, "--phases", "all", "--no-autotune"]
    keras_result = run_json([sys.executable, "benchmarks/plain_keras.py", split, *options])
    seconds = {
        "topwork, precision: auto": topwork_result["epochs"][-1]["seconds"],
        "plain Keras, float32": keras_result["epochs"]["all"][-1],
    }
    if torch.exists():
        script = [torch, "benchmarks/timm_torch.py", split, "--base", timm, "--side", side, "--epochs", EPOCHS]
        seconds["PyTorch and timm, bfloat16"] = run_json(script)["epochs"]["all"][-1]
    count = len(json.loads(splits.read_text())["train"])
    return count - count % 32, seconds


if __name__ == "__main__":
    main()
