"""`make bench`: topwork beside the plain Keras script that a user would write instead, on the same machine and images.

Reported are the seconds of an epoch's training steps, without validation and without the first epoch of each phase,
which traces. Each contender runs in a process of its own, one after the other. Images: the solar cells of the demo.
"""

import csv
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

SIDE, BATCH, EPOCHS, BASE = 96, 32, 4, "MobileNetV2"

JOB = """
apiVersion: topwork.dev/v1alpha1
kind: TransferJob
metadata: {{name: bench}}
spec:
  storage: s3://bench/topwork
  dataset:
    source: {{folder: {{uri: {folder}}}}}
    splits: {{train: "train[:80%]", validation: "train[80%:]"}}
    imageSize: [{side}, {side}]
  model: {{base: {{application: {base}, weights: none}}, head: {{dropout: 0.2}}}}
  augmentation: {{flip: horizontal}}
  transfer: {{epochs: {epochs}, batchSize: {batch}, featureCache: "off"}}
  fineTune: {{epochs: {epochs}, optimizer: {{learningRate: 1.0e-5}}}}
  compute: {{gpus: 0}}
"""


def main() -> None:
    """Run all contenders and print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pictures(Path(temporary) / "pictures")
        topwork = topwork_seconds(Path(temporary), folder)
        plain = plain_seconds(folder)
        plain_fixed = plain_seconds(folder, "--no-autotune")
    table = Table(title=f"{BASE} {SIDE}x{SIDE}, batch {BATCH}: seconds an epoch after the first, median")
    for column in ("phase", "topwork", "plain, autotuner on", "plain, autotuner off", "ratio on", "ratio off"):
        table.add_column(column, justify="right")
    for phase, ours in topwork.items():
        on, off = (statistics.median(each[phase][1:]) for each in (plain, plain_fixed))
        mine = statistics.median(ours[1:])
        table.add_row(phase, *(f"{value:.2f}" for value in (mine, on, off, on / mine, off / mine)))
    console = Console()
    console.print(table)
    console.print(f"topwork validate: {validate_seconds():.2f} s of CPU")


def pictures(folder: Path) -> Path:
    """Copy the solar cells that experts were sure of into class folders."""
    sys.path.insert(0, "examples/solar")
    from pictures import DATA, labelled

    for picture, condition in (row for rows in labelled().values() for row in rows):
        target = folder / condition
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(DATA / picture, target)
    return folder


def topwork_seconds(temporary: Path, folder: Path) -> dict[str, list[float]]:
    """Seconds of each epoch of `topwork run`, by stage, from the history that it publishes."""
    job = temporary / "job.yaml"
    job.write_text(JOB.format(folder=folder, side=SIDE, base=BASE, epochs=EPOCHS, batch=BATCH))
    state = str(temporary / "state")
    command = [sys.executable, "-m", "topwork"]
    subprocess.run([*command, "run", job, "--state", state, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    fetched = temporary / "model"
    subprocess.run(
        [*command, "models", "fetch", "s3://bench/topwork", "bench", fetched, "--state", state],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds: dict[str, list[float]] = {}
    with (fetched / "history.csv").open() as history:
        for row in csv.DictReader(history):
            seconds.setdefault(row["stage"], []).append(float(row["seconds"]))
    return seconds


def plain_seconds(folder: Path, *options: str) -> dict[str, list[float]]:
    """Seconds of each epoch of the plain script, by phase."""
    command = [sys.executable, "benchmarks/plain_keras.py", folder, "--base", BASE, "--side", str(SIDE)]
    command += ["--batch", str(BATCH), "--epochs", str(EPOCHS), *options]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def validate_seconds() -> float:
    """CPU seconds of one `topwork validate`, the best of five."""
    measured = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "topwork", "validate", "examples/solar-base.yaml"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        measured.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        time.sleep(0.1)
    return min(measured)


if __name__ == "__main__":
    main()
