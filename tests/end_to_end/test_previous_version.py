"""Storage of topwork 0.1.0 stays usable: published models are served, and a job continues with a new version.

`tests/fixtures/v0.1-layout.tar.xz` is a storage location as version 0.1.0 left it: images, a dataset, a run that
published a model, a run that was stopped in transfer and one that was stopped in fine-tuning. Version 0.1.0 stored
results by run, and decoded transparent and 16-bit images differently, so its datasets and stage results are not reused.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from topwork.clients.s3.storage import Storage

ARCHIVE = Path(__file__).parent.parent / "fixtures" / "v0.1-layout.tar.xz"
FINISHED = "finished-37044cd8"


@pytest.fixture
def old_storage(s3_settings) -> Storage:
    """The storage location of version 0.1.0, at the address that its specs name."""
    storage = Storage("s3://topwork-test/v0.1", s3_settings)
    storage.delete([stored.key for stored in storage.list("")])
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            storage.write(member.name, file.read())
    return storage


@pytest.fixture
def topwork_here(s3_settings, topwork) -> Callable[..., Any]:
    """Run a topwork command with the credentials of the storage; returns the completed process."""

    def call(*arguments: object) -> Any:
        variables = {
            "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
            "AWS_ACCESS_KEY_ID": s3_settings.access_key,
            "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
        }
        completed = topwork(*arguments, **variables)
        assert completed.returncode == 0, completed.stderr
        return completed

    return call


def test_model_of_the_previous_version_is_served_and_its_job_publishes_the_next_version(
    old_storage, s3_settings, topwork_here, tmp_path
):
    before = {stored.key: stored.etag for stored in old_storage.list("models/finished/1/")}
    spec, image = tmp_path / "job.yaml", tmp_path / "red.jpg"
    spec.write_bytes(old_storage.read(f"runs/{FINISHED}/spec.yaml"))
    image.write_bytes(old_storage.read("photos/red/00.jpg"))
    predicted = topwork_here("predict", f"{old_storage.uri}/models/finished/1", image, "--json").stdout
    assert json.loads(predicted)["classes"][0]["class"] == "red"

    # The storage may no longer contain the images of the source.
    photos = Storage(f"{old_storage.uri}-photos", s3_settings)
    for stored in list(old_storage.list("photos/")):
        photos.write(stored.key.removeprefix("photos/"), old_storage.read(stored.key))
    moved = f"spec.dataset.source.folder.uri={photos.uri}/"
    command = ("run", spec, "--set", moved, "--log-format", "json")
    log = [json.loads(line) for line in topwork_here(*command).stderr.splitlines()]
    assert {event["stage"] for event in log if event["message"] == "epoch"} == {"transfer", "fine-tune"}
    assert json.loads(old_storage.read("models/finished/latest.json"))["version"] == 2
    assert {stored.key: stored.etag for stored in old_storage.list("models/finished/1/")} == before


def test_gc_keeps_everything_that_the_previous_version_stored(old_storage, topwork_here):
    report = topwork_here("gc", old_storage.uri, "--dry-run", "--older-than", "0m", "--json").stdout
    assert json.loads(report)["found"] == []
