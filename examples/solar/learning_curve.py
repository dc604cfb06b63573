"""Measure and draw the AUC with and without transfer, for several numbers of training images per class.

    python examples/solar/learning_curve.py                      draws docs/images/learning-curve.svg
    python examples/solar/learning_curve.py --seeds 1 2 3        fewer seeds; the default is five

Runs solar-transfer.yaml and solar-scratch.yaml with each number of images and each seed. The seed selects the images of
all splits, the initial weights and the order of training. All runs of a job have the same number of steps: the fewer
images, the more epochs. Finished runs are read from storage, so an interrupted
measurement can be continued. Each of the 30 runs takes one to two minutes on two CPU cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from upload_base import upload_base
from upload_images import STORAGE, upload_images

from topwork.cli.runtime.storage import open_storage
from topwork.clients.s3.storage import Storage
from topwork.spec.loading.loader import read_jobs

JOBS = {"solar-transfer": "with transfer", "solar-scratch": "without transfer"}
IMAGES_PER_CLASS = (10, 25, 100)
VALIDATION_IMAGES, TEST_IMAGES = 50, 250
SEEDS = (1, 2, 3, 4, 5)
Scores = dict[tuple[str, int], list[float]]
"""AUC on the test split for each seed, by job and number of training images per class."""


def main() -> None:
    """Measure, print a table, and draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--output", type=Path, default=Path("docs/images/learning-curve.svg"))
    arguments = parser.parse_args()
    with open_storage(STORAGE) as storage:
        upload_images(storage)
        upload_base(storage)
    scores: Scores = {}
    for images in reversed(IMAGES_PER_CLASS):
        for seed in arguments.seeds:
            for job in JOBS:
                scores.setdefault((job, images), []).append(measure(job, images, seed))
                print(job, images, "images per class, seed", seed, "AUC", scores[job, images][-1], flush=True)
    for (job, images), values in sorted(scores.items()):
        print(f"{JOBS[job]:>16} {images:>4}: {statistics.mean(values):.3f} ± {deviation(values):.3f}  {values}")
    draw(scores, arguments.output)


def measure(job: str, images: int, seed: int) -> float:
    """Run a job, unless it is finished, and return the AUC on the test split."""
    name = f"{job}-{images}-{seed}"
    with open_storage(STORAGE) as storage:
        finished = read_auc(storage, name)
    if finished is not None:
        return finished
    splits = {"train": images, "validation": VALIDATION_IMAGES, "test": TEST_IMAGES}
    (example,) = read_jobs(Path(f"examples/{job}.yaml"))
    settings = {
        "metadata.name": name,
        "spec.seed": seed,
        "spec.transfer.epochs": example.spec.transfer.epochs * max(IMAGES_PER_CLASS) // images,
        "spec.dataset.splits.perClass": json.dumps(splits),
        "spec.evaluate.gates": "[]",
        "spec.publish.formats": "[keras]",
    }
    options = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "topwork", "run", f"examples/{job}.yaml", *options]
    completed = subprocess.run(command, check=False, capture_output=True, text=True)
    if completed.returncode:
        sys.exit(completed.stdout + completed.stderr)
    with open_storage(STORAGE) as storage:
        auc = read_auc(storage, name)
    assert auc is not None, f"{name} published no model"
    return auc


def read_auc(storage: Storage, name: str) -> float | None:
    """Return the AUC of the first version of a model, or None if there is none."""
    metrics = storage.read(f"models/{name}/1/metrics.json")
    return None if metrics is None else float(json.loads(metrics)["metrics"]["auc"])


def deviation(values: list[float]) -> float:
    """Return the standard deviation over seeds, 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def draw(scores: Scores, path: Path) -> None:
    """Draw mean and standard deviation over the seeds, and each run as a dot."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "topwork"  # the same file for the same scores
    figure, axes = plt.subplots(figsize=(7, 4))
    for (job, title), color in zip(JOBS.items(), ("#1b7f4d", "#8a8f98"), strict=True):
        sizes = [images for images in IMAGES_PER_CLASS if (job, images) in scores]
        means = [statistics.mean(scores[job, images]) for images in sizes]
        spread = [deviation(scores[job, images]) for images in sizes]
        axes.errorbar(sizes, means, yerr=spread, label=title, color=color, linewidth=2, capsize=4)
        for images in sizes:
            axes.plot([images] * len(scores[job, images]), scores[job, images], ".", color=color, alpha=0.5)
    axes.set_xscale("log")
    axes.set_xticks(IMAGES_PER_CLASS, [str(images) for images in IMAGES_PER_CLASS])
    axes.minorticks_off()
    axes.set_xlabel("training images per class")
    axes.set_ylabel("AUC on the test split")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    main()
