"""`make bench`: topwork beside the plain Keras script that a user would write instead, on the same machine and images.

Reported are the seconds of an epoch's training steps, without validation and without the first epoch of each phase,
which traces. Each contender runs in a process of its own, one after the other. Images: the solar cells of the demo.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from solar import JOB, last_line, pictures, split_folders

SIDE, EPOCHS, BASE = 96, 4, "MobileNetV2"


def main() -> None:
    """Run all contenders and print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ours = topwork_seconds(folder)
        split = split_folders(folder / "pictures", folder / "lists.json", folder / "split")
        on, off = plain_seconds(split), plain_seconds(split, "--no-autotune")
    table = Table(title=f"{BASE} {SIDE}x{SIDE}, batch 32: seconds an epoch after the first, median")
    for column in ("phase", "topwork", "plain, autotuner on", "plain, autotuner off", "ratio on", "ratio off"):
        table.add_column(column, justify="right")
    for phase, seconds in ours.items():
        mine, *theirs = (statistics.median(each[1:]) for each in (seconds, on[phase], off[phase]))
        table.add_row(phase, *(f"{value:.2f}" for value in (mine, *theirs, *(other / mine for other in theirs))))
    console = Console()
    console.print(table)
    console.print(f"topwork validate: {validate_seconds():.2f} s of CPU")
    metrics = last_line([sys.executable, "benchmarks/metrics.py"])
    for name, share in metrics["shares"].items():
        console.print(f"metrics: {metrics['recording'] * 1e6:.0f} us a step, {share:.2%} of one of {name}")
    console.print(f"metrics: {metrics['scrape'] * 1e3:.1f} ms and {metrics['bytes']} bytes a scrape")


def topwork_seconds(folder: Path) -> dict[str, list[float]]:
    """Seconds of each epoch by stage; the pictures and the lists of what each split holds stay in the folder."""
    job = folder / "job.yaml"
    transfer = json.dumps({"epochs": EPOCHS, "batchSize": 32, "featureCache": "off"})
    text = JOB.format(
        name="bench",
        folder=pictures(folder / "pictures"),
        application=BASE,
        weights="none",
        augmentation='{"flip": "horizontal"}',
        transfer=transfer,
        side=SIDE,
    )
    job.write_text(f"{text}  fineTune: {{epochs: {EPOCHS}, optimizer: {{learningRate: 1.0e-5}}}}\n")
    ended = last_line([sys.executable, "benchmarks/stages.py", job, folder / "state", "--lists", folder / "lists.json"])
    seconds: dict[str, list[float]] = {}
    for row in ended["epochs"]:
        seconds.setdefault(row["stage"], []).append(row["seconds"])
    return seconds


def plain_seconds(split: Path, *options: str) -> dict[str, list[float]]:
    """Seconds of each epoch of the plain script, by phase."""
    command = [sys.executable, "benchmarks/plain_keras.py", split, "--base", BASE, "--side", SIDE, "--epochs", EPOCHS]
    return last_line([*command, *options])["epochs"]


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
