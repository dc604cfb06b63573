"""A job whose stages run as processes that are killed and stopped, and what it left in storage."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import h5py
import numpy as np
from PIL import Image

from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.spec import TransferJob

BUCKET = "topwork-chaos"
STAGES = ("pull", "transfer", "fine-tune")
TRAINING = '"message": "parameters"'
EPOCH = '"message": "epoch"'
EVALUATION = '"message": "evaluation"'
# Where a stage is hit: at a time after its start, or after the first line that holds a text.
MARKS = {"pull": ("",), "transfer": ("", TRAINING, EPOCH, EPOCH), "fine-tune": ("", TRAINING, EPOCH, EPOCH)}
# What a stage trained it does not train again: hits that come soon leave room for others.
SOON = 3
TIMES = {"seconds", "stepSeconds", "images_per_second", "input_wait_seconds", "started", "finished"}

# All that has a state of its own; fine-tune trains on features, or on images.
SPEC: dict[str, Any] = {
    "augmentation": {"flip": "horizontal", "rotation": 0.1},
    "model": {"base": {"cnn": {"filters": [4, 6]}}, "head": {"hidden": [8], "dropout": 0.4}},
    "transfer": {
        "train": "all", "epochs": 8, "batchSize": 4, "earlyStopping": {"patience": 7},
        "optimizer": {
            "learningRate": 0.003, "schedule": {"name": "cosine", "warmupEpochs": 1}, "ema": {"momentum": 0.8},
        },
    },
    "fineTune": {
        "unfreeze": {"steps": [{"layers": 1, "epochs": 3, "learningRate": 0.002},
                               {"layers": 2, "epochs": 3, "learningRate": 0.001}]},
        "optimizer": {"name": "rmsprop", "momentum": 0.5},
        "featureCache": "off",
    },
    "publish": {"formats": ["keras"]},
    # An epoch takes half a second: a checkpoint or two in each.
    "compute": {"gpus": 0, "checkpointMinutes": 0.004},
}  # fmt: skip
STEPS_PER_EPOCH = 27


def pictures(folder: Path) -> Path:
    """Make 60 images of each of three classes, told apart by their colour."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for index in range(60):
            pixels = generator.integers(0, 160, (36, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 60
            Image.fromarray(pixels).save(folder / name / f"{index:02}.{'png' if index % 2 else 'jpg'}")
    return folder


def make_job(photos: Path, uri: str, **overrides: Any) -> TransferJob:
    """Build the job; keyword arguments replace whole keys of `spec`."""
    dataset = {
        "source": {"folder": {"uri": str(photos)}},
        "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
        "imageSize": [32, 32],
    }
    spec = {"storage": uri, "dataset": dataset, **SPEC, **overrides}
    return TransferJob.model_validate(
        {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "chaos"}, "spec": spec}
    )


@dataclass
class Figures:
    """What was done to a job: how often each stage was hit by each signal, and the steps that its processes trained."""

    hits: dict[tuple[str, str], int] = field(default_factory=dict)
    steps: int = 0

    def count(self, stage: str, number: int) -> None:
        key = (stage, signal.Signals(number).name)
        self.hits[key] = self.hits.get(key, 0) + 1

    def of(self, number: int) -> int:
        return sum(count for (_, name), count in self.hits.items() if name == signal.Signals(number).name)


class Process:
    """One process of a stage."""

    def __init__(self, stage: str, folder: Path, environment: dict[str, str]) -> None:
        self.stage = stage
        self._log = folder / f"{time.monotonic_ns()}-{stage}.log"
        ending = folder / "termination-log"
        ending.touch()
        command = [sys.executable, "-m", "topwork", "stage", stage, "--job", "job.json", "--scratch", "scratch"]
        command += ["--metrics-port", "0", "--termination-log", str(ending)]
        self.started = time.monotonic()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines; the last one of a process that was killed may be half a line."""
        found = []
        for line in self.output.splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def reaches(self, mark: str, seconds: float) -> bool:
        """Wait for a text and then for some seconds; False if the process has ended before."""
        while mark and mark not in self.output:
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is None

    def steps(self) -> int:
        """Steps that a process trained so far that still runs."""
        ports = [line["port"] for line in self.lines if line["message"] == "metrics"]
        if not ports:
            return 0
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
            return int(sum(float(line.split()[-1]) for line in lines if line.startswith("topwork_steps_total")))
        return 0

    def steps_to_the_end(self) -> int:
        """Steps that a process trained that has ended by itself: those of its epochs, but for those done before."""
        epochs = sum(line["message"] == "epoch" for line in self.lines)
        return epochs * STEPS_PER_EPOCH - sum(line["step"] for line in self.lines if line["message"] == "resumed")

    def hit(self, number: int, whole_group: bool) -> int:
        """Send a signal, to all processes as a node does or to the first alone, and wait for the end."""
        if whole_group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.process.wait(60)


class Run:
    """A job in a place of its own."""

    def __init__(self, job: TransferJob, folder: Path, settings: StorageSettings) -> None:
        folder.mkdir()
        (folder / "job.json").write_text(job.model_dump_json(by_alias=True, exclude_unset=True))
        self.job, self.figures = job, Figures()
        self.storage = Storage(job.spec.storage, settings)
        self.processes: list[Process] = []
        self._folder = folder
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
            "AWS_ENDPOINT_URL": settings.endpoint_url or "",
            "AWS_ACCESS_KEY_ID": settings.access_key or "",
            "AWS_SECRET_ACCESS_KEY": settings.secret_key or "",
            "AWS_EC2_METADATA_DISABLED": "true",
            "TOPWORK_GRACE_SECONDS": "30",
        }
        self._client = boto3.client(
            "s3",
            endpoint_url=settings.endpoint_url,
            aws_access_key_id=settings.access_key,
            aws_secret_access_key=settings.secret_key,
            region_name="us-east-1",
        )

    def start(self, stage: str) -> Process:
        self.processes.append(Process(stage, self._folder, self._environment))
        return self.processes[-1]

    def end(self, stage: str) -> Process:
        """Run a stage to its end."""
        process = self.start(stage)
        assert process.process.wait(240) == 0, process.output
        self.figures.steps += process.steps_to_the_end()
        return process

    def hit(self, stage: str, number: int, mark: str, seconds: float, whole_group: bool) -> bool:
        """Start a stage and send it a signal; False if it ended before."""
        process = self.start(stage)
        if not process.reaches(mark, seconds):
            assert process.process.wait() == 0, process.output
            self.figures.steps += process.steps_to_the_end()
            return False
        steps = process.steps()
        code = process.hit(number, whole_group)
        if code == 0:  # it was in its last moments
            self.figures.steps += process.steps_to_the_end()
            return False
        self.figures.steps += steps
        self.figures.count(stage, number)
        # A process that has not come to its handlers yet ends by the signal itself, which a shell calls 143, too.
        assert code in ({-signal.SIGKILL} if number == signal.SIGKILL else {143, -signal.SIGTERM}), process.output
        return True

    def is_done(self, stage: str) -> bool:
        if stage == "fine-tune":
            return self.storage.size(f"models/{self.job.model_name}/1/manifest.json") is not None
        return self.storage.size(f"runs/{self.job.run}/{stage}/done.json") is not None

    def keys(self) -> list[str]:
        """All keys; a model is named by its content, which holds the time."""
        keys = (stored.key.replace(self.job.run, "RUN") for stored in self.storage.list())
        return sorted(re.sub(r"model-[0-9a-f]{16}\.keras", "MODEL", key) for key in keys)

    def model(self, stage: str) -> str:
        """Key of the model that a stage made."""
        return str(json.loads(self.storage.read(f"runs/{self.job.run}/{stage}/done.json") or b"")["key"])

    def json(self, key: str) -> Any:
        """Read what differs by nothing but times and names of places."""
        text = (self.storage.read(key) or b"").decode()
        text = text.replace(self.job.run, "RUN").replace(self.job.spec.storage, "STORAGE")
        return without_times(json.loads(text))

    def weights(self, key: str) -> dict[str, np.ndarray]:
        """Read all weights of a `.keras` file."""
        file = zipfile.ZipFile(io.BytesIO(self.storage.read(key) or b"")).read("model.weights.h5")
        found: dict[str, np.ndarray] = {}
        with h5py.File(io.BytesIO(file)) as weights:
            weights.visititems(
                lambda name, part: found.update({name: part[()]}) if isinstance(part, h5py.Dataset) else None
            )
        return found

    def versions(self, prefix: str) -> dict[str, list[str]]:
        """List every version that was ever stored, also of what is deleted."""
        base = self.job.spec.storage.removeprefix(f"s3://{BUCKET}/")
        found: dict[str, list[str]] = {}
        pages = self._client.get_paginator("list_object_versions")
        for page in pages.paginate(Bucket=BUCKET, Prefix=f"{base}/{prefix}"):
            for version in page.get("Versions", ()):
                found.setdefault(version["Key"].removeprefix(f"{base}/"), []).append(version["VersionId"])
        return found

    def checkpoints(self) -> dict[str, dict[str, np.ndarray]]:
        """Read every whole checkpoint that was ever stored, by its stage and name."""
        prefix = f"runs/{self.job.run}/"
        versions = self.versions(prefix)
        found = {}
        for key, ids in versions.items():
            folder = key.rpartition("/")[0]
            if key.endswith("/state.npz") and f"{folder}/manifest.json" in versions:
                where = {"Bucket": BUCKET, "Key": f"{self.job.spec.storage.removeprefix(f's3://{BUCKET}/')}/{key}"}
                for number, version in enumerate(ids):
                    data = self._client.get_object(**where, VersionId=version)["Body"].read()
                    with np.load(io.BytesIO(data)) as arrays:
                        found[f"{folder.removeprefix(prefix)}#{number}"] = {name: arrays[name] for name in arrays.files}
        return found

    def left_running(self) -> list[int]:
        """Processes that outlived those that started them."""
        sessions = {process.process.pid for process in self.processes}
        pids = (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit())
        return [pid for pid in pids if session_of(pid) in sessions]


def session_of(pid: int) -> int | None:
    with suppress(OSError):
        return os.getsid(pid)
    return None


def without_times(value: Any) -> Any:
    """Leave out what a clock says."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def spans(stage: str, seen: dict[str, float], end: float) -> dict[str, float]:
    """Say how many seconds after each mark of a stage a hit may come.

    Args:
        stage: The stage.
        seen: When its marks were reached in a run that nobody interrupted; "" is its start.
        end: When that ended.
    """
    if stage == "pull":
        return {"": end - seen[""]}
    trained = seen.get(EVALUATION, end)
    # Most of the time before the first epoch ends goes into the graph of a step.
    found = {"": seen[TRAINING] - seen[""], TRAINING: seen[EPOCH] - seen[TRAINING], EPOCH: trained - seen[EPOCH]}
    found[EPOCH] /= SOON
    return found | ({EVALUATION: end - seen[EVALUATION]} if EVALUATION in seen else {})


def moment(marks: tuple[str, ...], allowed: dict[str, float], chance: random.Random) -> tuple[str, float]:
    """Choose a mark and the seconds after it."""
    mark = chance.choice(marks)
    return mark, chance.uniform(0.0, allowed[mark])
