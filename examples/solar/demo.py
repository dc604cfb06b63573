"""`make demo`: three jobs on real pictures of solar cells, then the two that can be compared, side by side.

1. solar-base learns to tell sound from defective monocrystalline cells, from scratch.
2. solar-transfer moves it to polycrystalline cells, with 10 pictures a class.
3. solar-scratch is the second without transfer.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from pictures import STORAGE, write_pictures
from rich.console import Console
from rich.table import Table

from topwork.cli.runtime.storage import open_storage

FOLDER = Path("build/solar")
COMPARED = {"solar-scratch": "without transfer", "solar-transfer": "with transfer"}


def main() -> None:
    """Run the jobs, fetch what they published and print how good it is."""
    with open_storage(STORAGE) as storage:
        counts = write_pictures(storage)
    print("Pictures:", ", ".join(f"{count} {kind}crystalline cells" for kind, count in counts.items()))
    for name in ("solar-base", *COMPARED):
        topwork("run", f"examples/{name}.yaml")
    folders = {name: fetched(name) for name in COMPARED}
    metrics = {name: json.loads((folder / "metrics.json").read_text())["metrics"] for name, folder in folders.items()}
    table = Table("on the test pictures", title="Polycrystalline cells: 10 pictures a class to train, 500 to test")
    for title in COMPARED.values():
        table.add_column(title, justify="right")
    for metric in ("accuracy", "f1", "auc", "loss"):
        table.add_row(metric, *(f"{metrics[name][metric]:.3f}" for name in COMPARED))
    Console().print(table)
    for name, folder in folders.items():
        print(f"{COMPARED[name]:>16}: model {folder}/model.keras, report {folder}/report.html")


def fetched(name: str) -> Path:
    """Fetch the latest published version of a model to a folder of its own."""
    target = FOLDER / name
    shutil.rmtree(target, ignore_errors=True)
    topwork("models", "fetch", STORAGE, name, str(target))
    return target


def topwork(*arguments: str) -> None:
    """Call `topwork` as a user would, and end where it fails."""
    print("\n$ topwork", *arguments, flush=True)
    ended = subprocess.run([sys.executable, "-m", "topwork", *arguments], check=False)
    if ended.returncode:
        sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
