"""Jobs without network access except to their storage: mirrored downloads are used, and missing ones are reported."""

from urllib.parse import urlsplit

import keras
import pytest
from tests.tfds_datasets import prepare_dataset

# A sitecustomize.py, which Python runs at startup. Child processes inherit it through PYTHONPATH.
BLOCK_CONNECTIONS = """
import os, socket, sys

def block(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        # Unix sockets connect to processes on the same machine.
        if isinstance(address, (str, bytes)) or tuple(address[:2]) == ("127.0.0.1", int(os.environ["ALLOWED_PORT"])):
            return
        error = ConnectionRefusedError(111, "blocked by the test")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[0]
        if address in ("127.0.0.1", b"127.0.0.1"):
            return
        error = socket.gaierror(-2, "blocked by the test")
    else:
        return
    with open(os.environ["BLOCKED_LOG"], "a") as log:
        print(event, address, file=log)
    raise error

sys.addaudithook(block)
"""
MODEL = {"base": {"application": "MobileNetV2", "weights": "imagenet"}, "head": {"dropout": 0.0}}
CATS_VS_DOGS = {
    "source": {"tfds": "cats_vs_dogs"},
    "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
    "imageSize": [32, 32],
}


@pytest.fixture
def blocked(tmp_path):
    """Log of blocked connections and lookups, one per line."""
    return tmp_path / "blocked.txt"


@pytest.fixture
def offline(topwork, s3_settings, tmp_path, blocked):
    """Run `topwork` with all connections blocked and logged, except those to its storage."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(BLOCK_CONNECTIONS)
    variables = {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_settings.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONPATH": str(tmp_path / "hook"),
        "ALLOWED_PORT": str(urlsplit(s3_settings.endpoint_url).port),
        "BLOCKED_LOG": str(blocked),
    }
    return lambda *arguments: topwork(*arguments, **variables)


def test_mirrored_job_connects_only_to_its_storage(offline, write_job, storage, tmp_path, blocked):
    model = keras.applications.MobileNetV2(weights=None, include_top=False)
    model.save_weights(tmp_path / "downloaded.weights.h5")
    prepare_dataset(tmp_path / "data", "cats_vs_dogs", "4.0.1", ("cat", "dog"), {"train": 60})

    downloaded = tmp_path / "downloaded.weights.h5"
    completed = offline("mirror", "weights", storage.uri, "--from", downloaded, "--as", "MobileNetV2")
    weights = f"{storage.uri}/weights/imagenet/MobileNetV2.weights.h5"
    assert (completed.returncode, completed.stdout) == (0, f"mirrored {weights}\n"), completed.stderr
    completed = offline("mirror", "tfds", storage.uri, "cats_vs_dogs", "--data-dir", tmp_path / "data")
    dataset = f"{storage.uri}/mirror/tfds/cats_vs_dogs/4.0.1/"
    assert (completed.returncode, completed.stdout) == (0, f"mirrored {dataset}\n"), completed.stderr

    job = write_job(dataset=CATS_VS_DOGS, model=MODEL, transfer={"epochs": 1, "batchSize": 12})
    completed = offline("mirror", "job", job)
    assert (completed.returncode, completed.stdout) == (0, f"found {weights}\nfound {dataset}\n"), completed.stderr
    completed = offline("run", job)
    assert completed.returncode == 0, completed.stderr
    assert f"{storage.uri}/models/tiny/1" in completed.stdout
    assert "- Input scaling: `pixel * 0.00784314 - 1`" in storage.read("models/tiny/1/card.md").decode()
    assert not blocked.exists(), blocked.read_text()


def test_dataset_that_is_not_mirrored_is_reported_with_the_mirror_command(offline, write_job, storage, blocked):
    completed = offline("run", write_job(dataset=CATS_VS_DOGS, model=MODEL))
    assert completed.returncode == 75, completed.stderr
    assert f"run `topwork mirror tfds {storage.uri} cats_vs_dogs` on a machine that has it" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert "download.microsoft.com" in blocked.read_text()


def test_weights_that_are_not_mirrored_are_reported_with_the_mirror_command(offline, write_job, storage, blocked):
    completed = offline("run", write_job(model=MODEL, transfer={"epochs": 1, "batchSize": 8}))
    assert completed.returncode == 75, completed.stderr
    assert f"run `topwork mirror weights {storage.uri} MobileNetV2` on a machine that has it" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert "storage.googleapis.com" in blocked.read_text()
