"""Shared parts of the benchmarks: a job spec, images of solar cells, and reading JSON output of subprocesses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

JOB_TEMPLATE = """
apiVersion: topwork.dev/v1alpha1
kind: TransferJob
metadata: {{name: {name}}}
spec:
  storage: s3://bench/topwork
  dataset:
    source: {{folder: {{uri: {directory}}}}}
    splits: {{train: "train[:65%]", validation: "train[65%:75%]", test: "train[75%:]"}}
    imageSize: [{side}, {side}]
  model: {{base: {{application: {application}, weights: {weights}}}, head: {{dropout: 0.2}}}}
  augmentation: {augmentation}
  transfer: {transfer}
  evaluate: {{metrics: [accuracy]}}
  publish: {{formats: [keras]}}
  compute: {{gpus: 0, scratch: 50Gi}}
"""


def copy_images(directory: Path, cell_types: tuple[str, ...] = ("mono", "poly")) -> Path:
    """Copy images of solar cells to one directory per class.

    Args:
        directory: Parent of the class directories.
        cell_types: Types of cells: mono, poly.

    Returns:
        `directory`.
    """
    sys.path.insert(0, "examples/solar")
    from upload_images import DATA, read_labels

    labels = read_labels()
    for image, condition in (label for cell_type in cell_types for label in labels[cell_type]):
        target = directory / condition
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(DATA / image, target)
    return directory


def run_command(command: list[Any], **options: Any) -> str:
    """Run a command and return its standard output."""
    completed = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, **options)
    if completed.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{completed.stderr[-3000:]}")
    return completed.stdout


def run_json(command: list[Any], **options: Any) -> Any:
    """Run a command and parse the last line of its output as JSON."""
    return json.loads(run_command(command, **options).splitlines()[-1])


def link_splits(images: Path, splits: Path, target: Path) -> Path:
    """Create the directories train, validation and test with links to the images that topwork uses for each split.

    Args:
        images: Parent of the class directories.
        splits: File written by `stages.py --splits`.
        target: Parent of the directories to create.

    Returns:
        `target`.
    """
    for split, names in json.loads(splits.read_text()).items():
        for name in names:
            link = target / split / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(images / name)
    return target
