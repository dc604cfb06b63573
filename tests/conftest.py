"""What all tests share: a real S3 server, a workspace on it, tiny jobs and tiny images."""

import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage, StorageSettings, make_bucket
from topwork.local.server import embedded_storage
from topwork.progress import Quiet
from topwork.spec import TransferJob
from topwork.workspace import Workspace

BUCKET = "topwork-test"


@pytest.fixture(autouse=True)
def process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command sets what holds for its process; the next test finds it as pytest left it."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    before = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(before)


@pytest.fixture(scope="session")
def s3_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageSettings]:
    with embedded_storage(tmp_path_factory.mktemp("s3")) as settings:
        make_bucket(settings, BUCKET)
        yield settings


@pytest.fixture
def storage(s3_settings: StorageSettings) -> Storage:
    return Storage(f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}", s3_settings)


@pytest.fixture
def workspace(storage: Storage, tmp_path: Path) -> Workspace:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Workspace(storage=storage, metrics=Metrics(), progress=Quiet(), scratch=scratch)


@pytest.fixture
def two_class_folder(tmp_path: Path) -> Path:
    """`<tmp>/photos/{blue,red}/*`: 20 images a class, PNG and JPEG, told apart by their colour."""
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
    """Build a tiny job on `two_class_folder`; keyword arguments replace whole keys of `spec`."""

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
            "publish": {"formats": ["keras", "savedModel"]},
            "compute": {"gpus": 0},
            **overrides,
        }
        return TransferJob.model_validate(
            {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "tiny"}, "spec": spec}
        )

    return make
