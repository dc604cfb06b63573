"""Fixtures of all tests: a real S3 server, a workspace that uses it, tiny jobs and tiny images."""

import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from tests.preloaded_python import PreloadedPython
from typer.testing import CliRunner

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from topwork.cli import app
from topwork.cli.output.progress import NoProgress
from topwork.cli.runtime.logging import configure_structlog
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage, StorageSettings, create_bucket
from topwork.local.server import embedded_storage
from topwork.spec import TransferJob
from topwork.workspace import Workspace

BUCKET = "topwork-test"


@pytest.fixture(autouse=True)
def restore_process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the process-wide settings that a command changes: logging, signals, hooks for unhandled exceptions."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    configure_structlog()
    root, topwork = logging.getLogger(), logging.getLogger("topwork")
    handlers, levels = root.handlers[:], (root.level, topwork.level)
    # Child processes inherit ignored signals.
    signal_handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in signal_handlers.items():
        signal.signal(number, handler)
    logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(levels[0])
    topwork.setLevel(levels[1])


@pytest.fixture(scope="session")
def s3_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageSettings]:
    with embedded_storage(tmp_path_factory.mktemp("s3")) as settings:
        create_bucket(settings, BUCKET)
        yield settings


@pytest.fixture(scope="session")
def preloaded_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreloadedPython]:
    python = PreloadedPython(tmp_path_factory.mktemp("python"))
    yield python
    python.close()


@pytest.fixture
def export_check_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the export check in this process: a new process takes seconds to start and is tested elsewhere."""
    from topwork.report import export_check

    process = SimpleNamespace(check=export_check.compare_predictions)
    monkeypatch.setattr(export_check, "CheckProcess", lambda: nullcontext(process))


@pytest.fixture
def storage(s3_settings: StorageSettings) -> Storage:
    return Storage(f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}", s3_settings)


@pytest.fixture
def command(s3_settings: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command against the test storage, like a user with their own endpoint."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", str(s3_settings.endpoint_url))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(s3_settings.access_key))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(s3_settings.secret_key))
    monkeypatch.setenv("AWS_REGION", "us-east-1")

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def workspace(storage: Storage, tmp_path: Path) -> Workspace:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Workspace(storage=storage, metrics=Metrics(), progress=NoProgress(), scratch=scratch)


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a tmpfs file system of a number of bytes; it is unmounted after the test."""
    disk = tmp_path / "disk"

    def mount(size: int) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs to mount a small disk: run as root (in a container with --cap-add SYS_ADMIN)")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def two_class_folder(tmp_path: Path) -> Path:
    """`<tmp>/photos/{blue,red}/*`: 20 images per class, PNG and JPEG, that differ in color."""
    random = np.random.default_rng(0)
    root = tmp_path / "photos"
    for channel, name in ((2, "blue"), (0, "red")):
        (root / name).mkdir(parents=True)
        for index in range(20):
            pixels = random.integers(0, 120, (40, 36, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{index:02}.{'png' if index % 2 else 'jpg'}")
    return root


@pytest.fixture
def make_job(storage: Storage, two_class_folder: Path) -> Callable[..., TransferJob]:
    """Build a tiny job that trains on `two_class_folder`; keyword arguments replace top-level keys of `spec`."""

    def make(**overrides: Any) -> TransferJob:
        spec = {
            "storage": storage.uri,
            "dataset": {
                "source": {"folder": {"uri": str(two_class_folder)}},
                "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
                "imageSize": [32, 32],
            },
            "model": {"base": {"cnn": {"filters": [4, 8]}}, "head": {"dropout": 0.0}},
            "transfer": {"train": "all", "epochs": 2, "batchSize": 8, "featureCache": "off"},
            "publish": {"formats": ["keras"]},  # a SavedModel takes seconds to trace
            "compute": {"gpus": 0},
            **overrides,
        }
        return TransferJob.model_validate(
            {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "tiny"}, "spec": spec}
        )

    return make
