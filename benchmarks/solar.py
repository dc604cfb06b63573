"""What the benchmarks share: pictures of solar cells, and processes that end with a JSON line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

JOB = """
apiVersion: topwork.dev/v1alpha1
kind: TransferJob
metadata: {{name: {name}}}
spec:
  storage: s3://bench/topwork
  dataset:
    source: {{folder: {{uri: {folder}}}}}
    splits: {{train: "train[:65%]", validation: "train[65%:75%]", test: "train[75%:]"}}
    imageSize: [{side}, {side}]
  model: {{base: {{application: {application}, weights: {weights}}}, head: {{dropout: 0.2}}}}
  augmentation: {augmentation}
  transfer: {transfer}
  evaluate: {{metrics: [accuracy]}}
  publish: {{formats: [keras]}}
  compute: {{gpus: 0, scratch: 50Gi}}
"""


def pictures(folder: Path, kinds: tuple[str, ...] = ("mono", "poly")) -> Path:
    """Copy the solar cells that experts were sure of into class folders.

    Args:
        folder: Where they go.
        kinds: Kinds of cells: mono, poly.

    Returns:
        The folder.
    """
    sys.path.insert(0, "examples/solar")
    from pictures import DATA, labelled

    rows = labelled()
    for picture, condition in (row for kind in kinds for row in rows[kind]):
        target = folder / condition
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(DATA / picture, target)
    return folder


def last_line(command: list[Any], **options: Any) -> Any:
    """Run a process to its end and read the JSON in the last line of its output."""
    ended = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, **options)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def split_folders(pictures: Path, lists: Path, target: Path) -> Path:
    """Lay out class folders below train, validation and test, with the images that topwork has chosen for each.

    Args:
        pictures: Class folders.
        lists: What `stages.py --lists` wrote.
        target: Where links to the pictures go.

    Returns:
        The target.
    """
    for split, names in json.loads(lists.read_text()).items():
        for name in names:
            link = target / split / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(pictures / name)
    return target
