"""A job that has no way out but to its storage: everything it needs was mirrored before, or it says what wasn't."""

from urllib.parse import urlsplit

import keras
import pytest
from tests.tfds_datasets import prepare_dataset

# Python runs it before anything else of the process; a child of the process inherits it by its environment.
REFUSAL = """
import os, socket, sys

def refuse(event, arguments):
    if event == "socket.connect":
        to = arguments[1]
        # A path stands for another process of this machine.
        if isinstance(to, (str, bytes)) or tuple(to[:2]) == ("127.0.0.1", int(os.environ["ONLY_PORT"])):
            return
        error = ConnectionRefusedError(111, "refused by the test")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        to = arguments[0]
        if to in ("127.0.0.1", b"127.0.0.1"):
            return
        error = socket.gaierror(-2, "refused by the test")
    else:
        return
    with open(os.environ["REFUSED"], "a") as log:
        print(event, to, file=log)
    raise error

sys.addaudithook(refuse)
"""
MODEL = {"base": {"application": "MobileNetV2", "weights": "imagenet"}, "head": {"dropout": 0.0}}
CATS_VS_DOGS = {
    "source": {"tfds": "cats_vs_dogs"},
    "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
    "imageSize": [32, 32],
}


@pytest.fixture
def refused(tmp_path):
    """What a process wanted to reach and was refused, a line each."""
    return tmp_path / "refused.txt"


@pytest.fixture
def offline(topwork, s3_settings, tmp_path, refused):
    """Run `topwork` with every outgoing connection refused and recorded, other than those to its storage."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(REFUSAL)
    variables = {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_settings.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONPATH": str(tmp_path / "hook"),
        "ONLY_PORT": str(urlsplit(s3_settings.endpoint_url).port),
        "REFUSED": str(refused),
    }
    return lambda *arguments: topwork(*arguments, **variables)


def test_a_mirrored_job_needs_no_connection_but_to_its_storage(offline, write, storage, tmp_path, refused):
    model = keras.applications.MobileNetV2(weights=None, include_top=False)
    model.save_weights(tmp_path / "own.weights.h5")
    prepare_dataset(tmp_path / "data", "cats_vs_dogs", "4.0.1", ("cat", "dog"), {"train": 60})

    said = offline("mirror", "weights", storage.uri, "MobileNetV2", "--file", tmp_path / "own.weights.h5")
    weights = f"{storage.uri}/weights/imagenet/MobileNetV2.weights.h5"
    assert (said.returncode, said.stdout) == (0, f"mirrored {weights}\n"), said.stderr
    said = offline("mirror", "tfds", storage.uri, "cats_vs_dogs", "--data-dir", tmp_path / "data")
    dataset = f"{storage.uri}/mirror/tfds/cats_vs_dogs/4.0.1/"
    assert (said.returncode, said.stdout) == (0, f"mirrored {dataset}\n"), said.stderr

    job = write(dataset=CATS_VS_DOGS, model=MODEL, transfer={"epochs": 1, "batchSize": 12})
    said = offline("mirror", "job", job)
    assert (said.returncode, said.stdout) == (0, f"found {weights}\nfound {dataset}\n"), said.stderr
    said = offline("run", job)
    assert said.returncode == 0, said.stderr
    assert f"{storage.uri}/models/tiny/1" in said.stdout
    assert not refused.exists(), refused.read_text()


def test_a_dataset_that_is_not_mirrored_is_told_with_the_command(offline, write, storage, refused):
    said = offline("run", write(dataset=CATS_VS_DOGS, model=MODEL))
    assert said.returncode == 75, said.stderr
    assert f"run `topwork mirror tfds {storage.uri} cats_vs_dogs` on a machine that has it" in said.stderr
    assert "Traceback" not in said.stderr
    assert "download.microsoft.com" in refused.read_text()


def test_weights_that_are_not_mirrored_are_told_with_the_command(offline, write, storage, refused):
    said = offline("run", write(model=MODEL, transfer={"epochs": 1, "batchSize": 8}))
    assert said.returncode == 75, said.stderr
    assert f"run `topwork mirror weights {storage.uri} MobileNetV2` on a machine that has it" in said.stderr
    assert "Traceback" not in said.stderr
    assert "storage.googleapis.com" in refused.read_text()
