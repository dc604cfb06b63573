"""A search whose coordinator is killed many times has the same trials, the same winner and the same model.

The short version has a few kills. With TOPWORK_LONG=1, there are 20. TOPWORK_CHAOS_SEED repeats the random moments of
an earlier run, but timing still varies.
"""

import io
import json
import os
import random
import signal
import time
import uuid
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from ruamel.yaml import YAML
from tests.chaos.interrupted_run import BUCKET, write_images
from tests.chaos.results import assert_equal_arrays, print_now

from topwork.clients.s3.storage import Storage, create_bucket

KILLS = 20 if os.environ.get("TOPWORK_LONG") == "1" else 5
MAX_ATTEMPTS = 10 * KILLS
SPACE = {
    "transfer.optimizer.learningRate": {"logUniform": [1e-4, 1e-1]},
    "model.head.dropout": {"uniform": [0.0, 0.5]},
}
TIMES = ("time", "writer", "seconds", "gpu_seconds")


class SearchRun:
    """Runs `topwork search` in processes of its own, and reads what it has stored."""

    def __init__(self, directory: Path, storage: Storage, python, environment: dict[str, str]) -> None:
        self.storage, self._directory, self._python, self._environment = storage, directory, python, environment
        images = write_images(directory / "images")
        content = {
            "apiVersion": "topwork.dev/v1alpha1",
            "kind": "TransferSearch",
            "metadata": {"name": "chaos"},
            "spec": {
                "trials": 6,
                "pruner": "asha",
                "space": SPACE,
                "template": {
                    "storage": storage.uri,
                    "dataset": {
                        "source": {"folder": {"uri": str(images)}},
                        "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
                        "imageSize": [32, 32],
                    },
                    "model": {"base": {"cnn": {"filters": [4, 8]}}, "head": {"dropout": 0.2}},
                    "transfer": {"train": "all", "epochs": 9, "batchSize": 8, "featureCache": "off"},
                    "publish": {"formats": ["keras"]},
                    "compute": {"gpus": 0, "checkpointMinutes": 0.004},
                },
            },
        }
        self.file = directory / "search.yaml"
        with self.file.open("w") as file:
            YAML().dump(content, file)

    def start(self):
        """Start the command; returns the process and the file of its output."""
        log = self._directory / f"{uuid.uuid4().hex}.log"
        with log.open("w") as output:
            process = self._python.start(
                ["-m", "topwork", "search", str(self.file)],
                stdout=output,
                stderr=output,
                env=self._environment,
                cwd=self._directory,
            )
        return process, log

    def complete(self) -> None:
        process, log = self.start()
        assert process.wait(900) == 0, log.read_text()

    def interrupt(self, number: int, seconds: float) -> bool:
        """Start the command and send it a signal after some time; returns False if it completes first."""
        process, log = self.start()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        code = process.wait(180)
        assert code in {0, -number, 143}, log.read_text()
        return code != 0

    def journal(self) -> list[dict]:
        keys = sorted(stored.key for stored in self.storage.list("searches/") if "/journal/" in stored.key)
        events = [json.loads(self.storage.read(key)) for key in keys]
        return [{name: value for name, value in event.items() if name not in TIMES} for event in events]

    def weights(self) -> dict[str, dict[str, np.ndarray]]:
        """Read the weights of the published model."""
        [key] = [
            stored.key
            for stored in self.storage.list("models/")
            if stored.key.endswith(".keras") and stored.key.startswith("models/chaos/1/")
        ]
        content = zipfile.ZipFile(io.BytesIO(self.storage.read(key) or b"")).read("model.weights.h5")
        weights = {}
        with h5py.File(io.BytesIO(content)) as file:
            file.visititems(
                lambda name, item: weights.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        return weights

    def clear(self) -> None:
        self.storage.delete([stored.key for stored in self.storage.list()])


@pytest.fixture
def search_run(tmp_path, s3_settings, preloaded_python):
    create_bucket(s3_settings, BUCKET)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))} | {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_settings.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(tmp_path),
        "TOPWORK_STATE": str(tmp_path / "state"),
    }
    storage = Storage(f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}", s3_settings)
    return SearchRun(tmp_path, storage, preloaded_python, environment)


def test_killed_search_has_the_results_of_an_uninterrupted_one(search_run, capsys):
    seed = int(os.environ.get("TOPWORK_CHAOS_SEED", random.randrange(10**6)))
    generator = random.Random(seed)
    started = time.monotonic()
    search_run.complete()
    duration = time.monotonic() - started
    journal, weights = search_run.journal(), search_run.weights()
    starts = [event["number"] for event in journal if event["event"] == "started"]
    assert starts == list(range(6))
    assert {event["event"] for event in journal} >= {"created", "started", "promoted", "finished", "ended", "published"}
    search_run.clear()

    kills = 0
    for _ in range(MAX_ATTEMPTS):
        number = generator.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        # The whole search takes about as long as all kills together: they hit every part of it.
        if not search_run.interrupt(number, generator.uniform(0.0, 2 * duration / KILLS)):
            search_run.clear()
            continue
        kills += 1
        if kills == KILLS:
            break
    search_run.complete()
    print_now(capsys, f"{kills} kills of a search of {duration:.0f} s, TOPWORK_CHAOS_SEED={seed}")
    assert kills == KILLS
    assert search_run.journal() == journal
    assert_equal_arrays(search_run.weights(), weights)
    versions = {stored.key.split("/")[2] for stored in search_run.storage.list("models/chaos/")}
    assert versions == {"1", "latest.json"}
