"""A job whose stages run in processes that receive SIGKILL and SIGTERM, and the objects that it leaves in storage."""

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
TRAINING_STARTED = '"message": "parameters"'
EPOCH_ENDED = '"message": "epoch"'
EVALUATED = '"message": "evaluation"'
# Log lines after which a stage is interrupted; "" is the start of the process.
MILESTONES = {
    "pull": ("",),
    "transfer": ("", TRAINING_STARTED, EPOCH_ENDED, EPOCH_ENDED),
    "fine-tune": ("", TRAINING_STARTED, EPOCH_ENDED, EPOCH_ENDED),
}
# A resumed stage has fewer epochs left. Interrupting it within this fraction of its epochs allows more interruptions.
EPOCHS_FRACTION = 1 / 3
TIME_FIELDS = {"seconds", "stepSeconds", "images_per_second", "input_wait_seconds", "started", "finished"}

# Uses all features with state in checkpoints: dropout, augmentation, schedule, EMA, early stopping, steps.
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
    # An epoch takes half a second: one or two checkpoints per epoch.
    "compute": {"gpus": 0, "checkpointMinutes": 0.004},
}  # fmt: skip
STEPS_PER_EPOCH = 27


def write_images(directory: Path) -> Path:
    """Write 60 images for each of three classes that differ in color."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (directory / name).mkdir(parents=True)
        for index in range(60):
            pixels = generator.integers(0, 160, (36, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 60
            Image.fromarray(pixels).save(directory / name / f"{index:02}.{'png' if index % 2 else 'jpg'}")
    return directory


def make_job(images: Path, uri: str, **overrides: Any) -> TransferJob:
    """Build the job. Keyword arguments replace top-level keys of `spec`."""
    dataset = {
        "source": {"folder": {"uri": str(images)}},
        "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
        "imageSize": [32, 32],
    }
    spec = {"storage": uri, "dataset": dataset, **SPEC, **overrides}
    return TransferJob.model_validate(
        {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "chaos"}, "spec": spec}
    )


def parse_lines(log: str) -> list[dict[str, Any]]:
    """Parse the lines of a log, except an incomplete last line of a killed process."""
    lines = []
    for line in log.splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


@dataclass
class Counts:
    """Number of interruptions by stage and signal name, and number of training steps over all processes."""

    interruptions: dict[tuple[str, str], int] = field(default_factory=dict)
    steps: int = 0

    def add(self, stage: str, number: int) -> None:
        """Count one interruption."""
        key = (stage, signal.Signals(number).name)
        self.interruptions[key] = self.interruptions.get(key, 0) + 1

    def total(self, number: int) -> int:
        """Return the number of interruptions by a signal."""
        return sum(count for (_, name), count in self.interruptions.items() if name == signal.Signals(number).name)


class StageProcess:
    """A process of `topwork stage`, in its own process group."""

    def __init__(self, stage: str, directory: Path, environment: dict[str, str]) -> None:
        self.stage = stage
        self._log = directory / f"{time.monotonic_ns()}-{stage}.log"
        termination_log = directory / "termination-log"
        termination_log.touch()
        command = [sys.executable, "-m", "topwork", "stage", stage, "--job", "job.json", "--scratch", "scratch"]
        command += ["--metrics-port", "0", "--termination-log", str(termination_log)]
        self.started = time.monotonic()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=directory, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All log lines, except an incomplete last line of a killed process."""
        return parse_lines(self.output)

    def wait_for(self, milestone: str, seconds: float) -> bool:
        """Wait for a log line, then for some seconds; returns False if the process exits first."""
        while milestone and milestone not in self.output:
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is None

    def scrape_steps(self) -> int:
        """Return the number of training steps of a running process from its metrics."""
        ports = [line["port"] for line in self.lines if line["message"] == "metrics"]
        if not ports:
            return 0
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
            return int(sum(float(line.split()[-1]) for line in lines if line.startswith("topwork_steps_total")))
        return 0

    def count_steps(self) -> int:
        """Return the number of training steps of a process that completed its stage, from its log."""
        epochs = sum(line["message"] == "epoch" for line in self.lines)
        return epochs * STEPS_PER_EPOCH - sum(line["step"] for line in self.lines if line["message"] == "resumed")

    def interrupt(self, number: int, to_group: bool) -> int:
        """Send a signal to the process, or to its process group as a node does, and return the exit code."""
        if to_group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.process.wait(60)


class JobRun:
    """Runs the stages of a job, and reads its results from storage.

    Attributes:
        job: The job.
        counts: Interruptions and training steps so far.
        storage: Storage of the job.
        processes: All processes of the stages.
    """

    def __init__(self, job: TransferJob, directory: Path, settings: StorageSettings) -> None:
        directory.mkdir()
        (directory / "job.json").write_text(job.model_dump_json(by_alias=True, exclude_unset=True))
        self.job, self.counts = job, Counts()
        self.storage = Storage(job.spec.storage, settings)
        self.processes: list[StageProcess] = []
        self._directory = directory
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

    def start(self, stage: str) -> StageProcess:
        self.processes.append(StageProcess(stage, self._directory, self._environment))
        return self.processes[-1]

    def complete(self, stage: str) -> StageProcess:
        """Run a stage until it is complete."""
        process = self.start(stage)
        assert process.process.wait(240) == 0, process.output
        self.counts.steps += process.count_steps()
        return process

    def interrupt(self, stage: str, number: int, milestone: str, seconds: float, to_group: bool) -> bool:
        """Start a stage and send it a signal; returns False if it completes first."""
        process = self.start(stage)
        if not process.wait_for(milestone, seconds):
            assert process.process.wait() == 0, process.output
            self.counts.steps += process.count_steps()
            return False
        steps = process.scrape_steps()
        code = process.interrupt(number, to_group)
        if code == 0:  # the stage was already complete
            self.counts.steps += process.count_steps()
            return False
        self.counts.steps += steps
        self.counts.add(stage, number)
        # Before the signal handlers are installed, the signal itself ends the process. A shell reports 143 for both.
        assert code in ({-signal.SIGKILL} if number == signal.SIGKILL else {143, -signal.SIGTERM}), process.output
        return True

    def is_done(self, stage: str) -> bool:
        if stage == "fine-tune":
            return self.storage.size(f"models/{self.job.model_name}/1/manifest.json") is not None
        return self.storage.size(f"runs/{self.job.run}/{stage}/done.json") is not None

    def keys(self) -> list[str]:
        """List all keys. The digest of a model file is masked: it depends on the creation time of the file."""
        keys = (stored.key.replace(self.job.run, "RUN") for stored in self.storage.list())
        return sorted(re.sub(r"model-[0-9a-f]{16}\.keras", "MODEL", key) for key in keys)

    def model_key(self, stage: str) -> str:
        """Return the key of the model that a stage stored."""
        return str(json.loads(self.storage.read(self.result_key(stage)) or b"")["key"])

    def result_key(self, stage: str) -> str:
        """Return the key of the result of a training stage."""
        reference = json.loads(self.storage.read(f"runs/{self.job.run}/{stage}/done.json") or b"")
        return f"stages/{stage}/{reference['key']}/done.json"

    def read_json(self, key: str) -> Any:
        """Read a JSON object without times, run name and storage URI, which differ between runs."""
        text = (self.storage.read(key) or b"").decode()
        text = text.replace(self.job.run, "RUN").replace(self.job.spec.storage, "STORAGE")
        return remove_times(json.loads(text))

    def read_weights(self, key: str) -> dict[str, np.ndarray]:
        """Read all weights of a `.keras` file."""
        content = zipfile.ZipFile(io.BytesIO(self.storage.read(key) or b"")).read("model.weights.h5")
        weights: dict[str, np.ndarray] = {}
        with h5py.File(io.BytesIO(content)) as file:
            file.visititems(
                lambda name, item: weights.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        return weights

    def object_versions(self, prefix: str) -> dict[str, list[str]]:
        """List the version IDs of all objects by key, including deleted objects."""
        base = self.job.spec.storage.removeprefix(f"s3://{BUCKET}/")
        ids: dict[str, list[str]] = {}
        pages = self._client.get_paginator("list_object_versions")
        for page in pages.paginate(Bucket=BUCKET, Prefix=f"{base}/{prefix}"):
            for version in page.get("Versions", ()):
                ids.setdefault(version["Key"].removeprefix(f"{base}/"), []).append(version["VersionId"])
        return ids

    def read_checkpoints(self) -> dict[str, dict[str, np.ndarray]]:
        """Read all complete checkpoints, including deleted ones, by stage and name."""
        versions = self.object_versions("stages/")
        checkpoints = {}
        for key, ids in versions.items():
            checkpoint = key.rpartition("/")[0]
            if key.endswith("/state.npz") and f"{checkpoint}/manifest.json" in versions:
                location = {"Bucket": BUCKET, "Key": f"{self.job.spec.storage.removeprefix(f's3://{BUCKET}/')}/{key}"}
                for number, version in enumerate(ids):
                    data = self._client.get_object(**location, VersionId=version)["Body"].read()
                    with np.load(io.BytesIO(data)) as arrays:
                        _, stage, *_, name = checkpoint.split("/")
                        checkpoints[f"{stage}/{name}#{number}"] = {name: arrays[name] for name in arrays.files}
        return checkpoints

    def orphans(self) -> list[int]:
        """List the processes of the stages that are still running."""
        sessions = {process.process.pid for process in self.processes}
        pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
        return [pid for pid in pids if session_id(pid) in sessions]


def session_id(pid: int) -> int | None:
    with suppress(OSError):
        return os.getsid(pid)
    return None


def remove_times(value: Any) -> Any:
    """Remove time fields from JSON content."""
    if isinstance(value, dict):
        return {name: remove_times(item) for name, item in value.items() if name not in TIME_FIELDS}
    return [remove_times(item) for item in value] if isinstance(value, list) else value


def interruption_windows(stage: str, reached: dict[str, float], end: float) -> dict[str, float]:
    """Return how long after each milestone a stage can be interrupted, in seconds.

    Args:
        stage: The stage.
        reached: Times at which an uninterrupted run reached the milestones, in seconds; "" is the start.
        end: Time at which that run ended.
    """
    if stage == "pull":
        return {"": end - reached[""]}
    trained = reached.get(EVALUATED, end)
    windows = {
        "": reached[TRAINING_STARTED] - reached[""],
        # Most of the time before the first epoch ends is spent tracing the graph of a step.
        TRAINING_STARTED: reached[EPOCH_ENDED] - reached[TRAINING_STARTED],
        EPOCH_ENDED: (trained - reached[EPOCH_ENDED]) * EPOCHS_FRACTION,
    }
    if EVALUATED in reached:
        windows[EVALUATED] = end - reached[EVALUATED]
    return windows


def choose_moment(
    milestones: tuple[str, ...], windows: dict[str, float], generator: random.Random
) -> tuple[str, float]:
    """Choose a milestone and a number of seconds after it."""
    milestone = generator.choice(milestones)
    return milestone, generator.uniform(0.0, windows[milestone])
