"""The memory of every stage is independent of the number of images: 1,000, 4,000 and 16,000.

The tests measure the anonymous memory of a process (RssAnon), because the kernel can reclaim mapped files on scratch at
any time. The feature cache is off: cached features may use up to a quarter of the free memory.
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
# Memory per image for lists of offsets, labels and names.
BYTES_PER_IMAGE = 1000
# Memory by which two identical processes can differ.
NOISE_BYTES = 24 << 20

# TFDS sorts with a buffer of 2 MB instead of 1 GB.
SCRIPT = """
import json, sys, threading
from pathlib import Path

peak, stopped = [0], threading.Event()

def watch():
    while not stopped.wait(0.01):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], 1024 * int(line.split()[1]))

if __name__ == "__main__":
    import tensorflow_datasets.core.shuffle as shuffle
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.clients.s3.storage import Storage, StorageSettings
    from topwork.cli.output.progress import NoProgress
    from topwork.pipeline import prepare_training
    from topwork.spec import TransferJob
    from topwork.stages.fine_tune import fine_tune
    from topwork.stages.publish import publish
    from topwork.stages.pull import pull
    from topwork.stages.transfer import transfer
    from topwork.workspace import Workspace

    shuffle.MAX_MEM_BUFFER_SIZE = 2 << 20
    request = json.loads(sys.stdin.read())
    storage = Storage(request["storage"], StorageSettings(**request["settings"]))
    workspace = Workspace(storage, Metrics(), NoProgress(), Path(request["scratch"]))
    job = TransferJob.model_validate(request["job"])
    threading.Thread(target=watch, daemon=True).start()
    prepare_training(job, workspace)
    peaks = {}
    def record(stage, result):
        peaks[stage], peak[0] = peak[0], 0
        return result
    dataset = record("pull", pull(job, workspace))
    classifier = record("transfer", transfer(job, dataset, workspace))
    classifier = record("fine-tune", fine_tune(job, classifier, dataset, workspace))
    record("publish", publish(job, classifier, dataset, workspace))
    print(json.dumps({"images": dataset.metadata.images, "peaks": peaks}))
"""


def write_images(directory: Path, count: int) -> Path:
    """Write random images of 16 by 16 pixels in two classes that differ in brightness."""
    random = np.random.default_rng(0)
    for index in range(count):
        path = directory / "ab"[index % 2] / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 128, (16, 16, 3), dtype=np.uint8) + 127 * (index % 2)).save(path)
    return directory


def measure_peaks(count: int, s3_settings, directory: Path) -> dict[str, int]:
    spec = {
        "storage": f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}",
        "dataset": {
            "source": {"folder": {"uri": str(write_images(directory / "images", count))}},
            "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
            "imageSize": [16, 16],
        },
        "model": {"base": {"cnn": {"filters": [2]}}},
        "transfer": {"train": "all", "epochs": 1, "batchSize": 32, "featureCache": "off"},
        "fineTune": {"epochs": 1},
        "publish": {"formats": ["keras"]},
        "compute": {"gpus": 0},
    }
    (directory / "scratch").mkdir()
    (directory / "script.py").write_text(SCRIPT)
    settings = {"endpoint_url": s3_settings.endpoint_url, "access_key": s3_settings.access_key,
                "secret_key": s3_settings.secret_key}  # fmt: skip
    job = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "many"}, "spec": spec}
    request = {"storage": spec["storage"], "settings": settings, "scratch": str(directory / "scratch"), "job": job}
    completed = subprocess.run(
        [sys.executable, directory / "script.py"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout.splitlines()[-1])
    assert result["images"] == count
    return result["peaks"]


@pytest.mark.skipif(
    not os.environ.get("TOPWORK_LONG"), reason="takes minutes; run with: TOPWORK_LONG=1 make test-faults"
)
@pytest.mark.timeout(1800)
def test_peak_memory_does_not_grow_with_the_number_of_images(s3_settings, tmp_path, capsys):
    peaks = {}
    for count in COUNTS:
        (tmp_path / str(count)).mkdir()
        peaks[count] = measure_peaks(count, s3_settings, tmp_path / str(count))
        with capsys.disabled():
            sizes = ", ".join(f"{stage} {peaks[count][stage] / 2**20:.0f} MiB" for stage in STAGES)
            print(f"\n{count:>6} images: {sizes}", flush=True)
    baseline = peaks[COUNTS[0]]
    for count in COUNTS[1:]:
        allowed = NOISE_BYTES + BYTES_PER_IMAGE * (count - COUNTS[0])
        for stage in STAGES:
            assert peaks[count][stage] - baseline[stage] < allowed, (count, stage, peaks)
