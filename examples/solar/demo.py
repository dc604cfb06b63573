"""`make demo`: trains on real images of solar cells, and compares results with and without transfer learning.

1. Converts EfficientNet-Lite0 with ImageNet weights to a Keras model, and checks it on known photographs.
2. solar-transfer trains a new head on its features to tell defective cells from sound ones, with 100 images per class.
3. solar-scratch trains a small CNN on the same images without transfer.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from upload_base import upload_base
from upload_images import STORAGE, upload_images

from topwork.cli.runtime.storage import open_storage

OUTPUT_DIRECTORY = Path("build/solar")
COMPARED_JOBS = {"solar-scratch": "without transfer", "solar-transfer": "with transfer"}


def main() -> None:
    """Run the jobs, fetch their models and print a table of the results."""
    with open_storage(STORAGE) as storage:
        upload_base(storage)
        counts = upload_images(storage)
    print(f"Base: EfficientNet-Lite0 with ImageNet weights. Images: {counts['poly']} polycrystalline cells.")
    for name in COMPARED_JOBS:
        topwork("run", f"examples/{name}.yaml")
    directories = {name: fetch_model(name) for name in COMPARED_JOBS}
    metrics = {
        name: json.loads((directory / "metrics.json").read_text())["metrics"] for name, directory in directories.items()
    }
    table = Table("metric on test split", title="Polycrystalline cells, 100 training images per class")
    for title in COMPARED_JOBS.values():
        table.add_column(title, justify="right")
    for metric in ("accuracy", "f1", "auc", "loss"):
        table.add_row(metric, *(f"{metrics[name][metric]:.3f}" for name in COMPARED_JOBS))
    Console().print(table)
    for name, directory in directories.items():
        print(f"{COMPARED_JOBS[name]:>16}: model {directory}/model.keras, report {directory}/report.html")


def fetch_model(name: str) -> Path:
    """Fetch the latest version of a model and return its directory."""
    target = OUTPUT_DIRECTORY / name
    shutil.rmtree(target, ignore_errors=True)
    topwork("models", "fetch", STORAGE, name, str(target))
    return target


def topwork(*arguments: str) -> None:
    """Run a `topwork` command, and exit if it fails."""
    print("\n$ topwork", *arguments, flush=True)
    completed = subprocess.run([sys.executable, "-m", "topwork", *arguments], check=False)
    if completed.returncode:
        sys.exit(completed.returncode)


if __name__ == "__main__":
    main()
