"""`make demo`: three jobs on real pictures of solar cells, then the two that can be compared, side by side.

1. solar-base learns to tell sound from defective monocrystalline cells, from scratch.
2. solar-transfer moves it to polycrystalline cells, with 10 pictures a class.
3. solar-scratch is the second without transfer.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tables import write_tables

from topwork.cli.surroundings import storage_at
from topwork.spec.reading import read_jobs

EXAMPLES = Path("examples")
COMPARED = ("solar-scratch", "solar-transfer")


def main() -> None:
    """Run the jobs and print what came out of them."""
    print("Pictures:", ", ".join(f"{count} {kind}crystalline cells" for kind, count in write_tables().items()))
    seconds = {name: run(name) for name in ("solar-base", *COMPARED)}
    metrics = {name: published_metrics(name) for name in COMPARED}
    table = Table(title="Polycrystalline cells: 10 pictures a class to train, 500 to test")
    for column in ("", "without transfer", "with transfer"):
        table.add_column(column, justify="left" if not column else "right")
    for metric in metrics["solar-transfer"]:
        table.add_row(f"test {metric}", *(f"{metrics[name][metric]:.3f}" for name in COMPARED))
    table.add_row("seconds, all in all", *(f"{seconds[name]:.0f}" for name in COMPARED))
    Console().print(table)


def run(name: str) -> float:
    """Run `examples/<name>.yaml` as a user would, and return the seconds that it took."""
    started = time.monotonic()
    print(f"\n$ topwork run {EXAMPLES}/{name}.yaml", flush=True)
    ended = subprocess.run([sys.executable, "-m", "topwork", "run", f"{EXAMPLES}/{name}.yaml"], check=False)
    if ended.returncode:
        sys.exit(ended.returncode)
    return time.monotonic() - started


def published_metrics(name: str) -> dict[str, float]:
    """Read the metrics of the latest published version from storage."""
    (job,) = read_jobs(EXAMPLES / f"{name}.yaml")
    with storage_at(job.spec.storage) as storage:
        latest = json.loads(storage.read(f"models/{name}/latest.json") or b"{}")
        stored = storage.read(f"models/{name}/{latest['version']}/metrics.json") or b"{}"
    return dict(json.loads(stored)["metrics"])


if __name__ == "__main__":
    main()
