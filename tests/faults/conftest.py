"""A job that is small enough to run a hundred times, and a fault-injecting proxy in front of its storage."""

import uuid
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from tests.conftest import BUCKET
from tests.faults.proxy import Proxy, run_proxy

from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.spec import TransferJob


@pytest.fixture(autouse=True)
def check_exports_in_process(export_check_in_process: None) -> None:
    """The export check sends no requests to storage."""


@pytest.fixture
def proxy(s3_settings: StorageSettings) -> Iterator[Proxy]:
    with run_proxy(str(s3_settings.endpoint_url)) as running:
        yield running


@pytest.fixture(scope="module")
def small_job(s3_settings: StorageSettings, tmp_path_factory: pytest.TempPathFactory) -> TransferJob:
    """A job on 24 images in storage. `spec.storage` is unused: tests choose the storage of the workspace."""
    photos = Storage(f"s3://{BUCKET}/photos-{uuid.uuid4().hex[:8]}", s3_settings)
    directory, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for channel, name in ((2, "blue"), (0, "red")):
        for index in range(12):
            pixels = random.integers(0, 120, (10, 9, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(directory / "image.png")
            photos.write(f"{name}/{index:02}.png", (directory / "image.png").read_bytes())
    spec = {
        "storage": f"s3://{BUCKET}/nowhere",
        "dataset": {
            "source": {"folder": {"uri": photos.uri}},
            "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
            "imageSize": [16, 16],
        },
        "model": {"base": {"cnn": {"filters": [2]}}, "head": {"dropout": 0.0}},
        "transfer": {"train": "all", "epochs": 1, "batchSize": 6, "featureCache": "off"},
        "fineTune": {"epochs": 1},
        "publish": {"formats": ["keras"]},
        "compute": {"gpus": 0},
    }
    return TransferJob.model_validate(
        {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "small"}, "spec": spec}
    )
