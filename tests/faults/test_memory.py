"""Memory of every stage stays flat as the images grow in number: 1,000, 4,000 and 16,000.

Measured is the memory that a process has for itself (RssAnon): what it maps of files on scratch the kernel takes back
whenever it needs to. Features in memory are left out here: they may grow, up to a quarter of what is free.
"""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.conftest import BUCKET

COUNTS = (1000, 4000, 16000)
STAGES = ("pull", "transfer", "fine-tune", "publish")
# What an image costs in lists of its place, its label and its name, and what two equal processes differ by.
BYTES_AN_IMAGE = 1000
NOISE_BYTES = 24 << 20

# Scratch of a few images only is kept resized in a file; TFDS sorts in 2 MB of memory, which is 1 GB otherwise.
SCRIPT = """
import json, sys, threading
from pathlib import Path

peak, ended = [0], threading.Event()

def watch():
    while not ended.wait(0.01):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], 1024 * int(line.split()[1]))

if __name__ == "__main__":
    import tensorflow_datasets.core.shuffle as shuffle
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.clients.s3.storage import Storage, StorageSettings
    from topwork.pipeline import prepare_training
    from topwork.cli.output.progress import NoProgress
    from topwork.spec import TransferJob
    from topwork.stages.fine_tune import fine_tune
    from topwork.stages.publish import publish
    from topwork.stages.pull import pull
    from topwork.stages.transfer import transfer
    from topwork.workspace import Workspace

    shuffle.MAX_MEM_BUFFER_SIZE = 2 << 20
    asked = json.loads(sys.stdin.read())
    storage = Storage(asked["storage"], StorageSettings(**asked["settings"]))
    workspace = Workspace(storage, Metrics(), NoProgress(), Path(asked["scratch"]))
    job = TransferJob.model_validate(asked["job"])
    threading.Thread(target=watch, daemon=True).start()
    prepare_training(job, workspace)
    peaks = {}
    def of(stage, made):
        peaks[stage], peak[0] = peak[0], 0
        return made
    dataset = of("pull", pull(job, workspace))
    classifier = of("transfer", transfer(job, dataset, workspace))
    classifier = of("fine-tune", fine_tune(job, classifier, dataset, workspace))
    of("publish", publish(job, classifier, dataset, workspace))
    print(json.dumps({"images": dataset.metadata.images, "peaks": peaks}))
"""


def tiny_images(folder: Path, count: int) -> Path:
    """Different pictures of 16 by 16 pixels in two classes, told apart by their brightness."""
    random = np.random.default_rng(0)
    for index in range(count):
        path = folder / "ab"[index % 2] / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 128, (16, 16, 3), dtype=np.uint8) + 127 * (index % 2)).save(path)
    return folder


def peaks_of(count: int, s3_settings, folder: Path) -> dict[str, int]:
    spec = {
        "storage": f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}",
        "dataset": {
            "source": {"folder": {"uri": str(tiny_images(folder / "images", count))}},
            "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
            "imageSize": [16, 16],
        },
        "model": {"base": {"cnn": {"filters": [2]}}},
        "transfer": {"train": "all", "epochs": 1, "batchSize": 32, "featureCache": "off"},
        "fineTune": {"epochs": 1},
        "publish": {"formats": ["keras"]},
        "compute": {"gpus": 0},
    }
    (folder / "scratch").mkdir()
    (folder / "script.py").write_text(SCRIPT)
    settings = {"endpoint_url": s3_settings.endpoint_url, "access_key": s3_settings.access_key,
                "secret_key": s3_settings.secret_key}  # fmt: skip
    job = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "many"}, "spec": spec}
    asked = {"storage": spec["storage"], "settings": settings, "scratch": str(folder / "scratch"), "job": job}
    done = subprocess.run(
        [sys.executable, folder / "script.py"], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["images"] == count
    return told["peaks"]


@pytest.mark.skipif(not os.environ.get("TOPWORK_LONG"), reason="takes minutes: TOPWORK_LONG=1 make test-faults")
@pytest.mark.timeout(1800)
def test_the_peak_of_no_stage_grows_with_the_number_of_images(s3_settings, tmp_path, capsys):
    found = {}
    for count in COUNTS:
        (tmp_path / str(count)).mkdir()
        found[count] = peaks_of(count, s3_settings, tmp_path / str(count))
        with capsys.disabled():
            shown = ", ".join(f"{stage} {found[count][stage] / 2**20:.0f} MiB" for stage in STAGES)
            print(f"\n{count:>6} images: {shown}", flush=True)
    few = found[COUNTS[0]]
    for count in COUNTS[1:]:
        allowed = NOISE_BYTES + BYTES_AN_IMAGE * (count - COUNTS[0])
        for stage in STAGES:
            assert found[count][stage] - few[stage] < allowed, (count, stage, found)
