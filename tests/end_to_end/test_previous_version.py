"""The current version of topwork completes runs that an older version started.

`tests/fixtures/v0.1-layout.tar.xz` is a storage location as version 0.1.0 left it: a dataset, a run that published a
model, a run that was stopped in transfer (on cached features) and one that was stopped in fine-tuning.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from topwork.clients.s3.storage import Storage
from topwork.spec.loading.loader import read_jobs

ARCHIVE = Path(__file__).parent.parent / "fixtures" / "v0.1-layout.tar.xz"
FINISHED = "finished-37044cd8"
STOPPED_IN_TRANSFER = "stopped-in-transfer-8aa1d9b4"
STOPPED_IN_FINE_TUNE = "stopped-in-fine-tune-63416c73"


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
def run_again(old_storage, s3_settings, topwork, tmp_path) -> Callable[[str], str]:
    """Run the spec of an old run again with `topwork run` and return the log."""

    def call(run: str) -> str:
        spec = tmp_path / "job.yaml"
        spec.write_bytes(old_storage.read(f"runs/{run}/spec.yaml"))
        assert [job.run for job in read_jobs(spec)] == [run]
        variables = {
            "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
            "AWS_ACCESS_KEY_ID": s3_settings.access_key,
            "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
        }
        completed = topwork("run", spec, "--log-format", "json", **variables)
        assert completed.returncode == 0, completed.stderr
        return completed.stderr

    return call


def events(log: str) -> list[dict]:
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def trained_epochs(log: str) -> list[tuple[str, int]]:
    return [(event["stage"], event["epoch"]) for event in events(log) if event["message"] == "epoch"]


def history(storage: Storage, run: str) -> list[list[str]]:
    return [line.split(",") for line in storage.read(f"runs/{run}/history.csv").decode().splitlines()]


def test_run_stopped_in_transfer_by_the_previous_version_resumes_at_its_checkpoint(old_storage, run_again):
    log = run_again(STOPPED_IN_TRANSFER)
    resumed = next(event for event in events(log) if event["message"] == "resumed")
    assert (resumed["stage"], resumed["epoch"], resumed["step"]) == ("transfer", 3, 0)
    assert trained_epochs(log) == [
        *(("transfer", epoch) for epoch in range(4, 61)),
        *(("fine-tune", epoch) for epoch in range(1, 13)),
    ]
    assert len(history(old_storage, STOPPED_IN_TRANSFER)) == 1 + 60 + 12
    assert old_storage.read("models/stopped-in-transfer/latest.json") is not None


def test_run_stopped_in_fine_tuning_by_the_previous_version_resumes_at_its_checkpoint(old_storage, run_again):
    log = run_again(STOPPED_IN_FINE_TUNE)
    resumed = next(event for event in events(log) if event["message"] == "resumed")
    assert (resumed["stage"], resumed["epoch"], resumed["step"]) == ("fine-tune", 3, 0)
    assert trained_epochs(log) == [("fine-tune", epoch) for epoch in range(4, 13)]
    # Version 0.1.0 wrote the rows of the epochs before the stop.
    rows = history(old_storage, STOPPED_IN_FINE_TUNE)
    assert [round(float(row[rows[0].index("loss")]), 4) for row in rows[3:6]] == [0.6614, 0.6596, 0.6586]
    assert old_storage.read("models/stopped-in-fine-tune/latest.json") is not None


def test_model_published_by_the_previous_version_is_not_trained_again(old_storage, run_again):
    before = {stored.key: stored.etag for stored in old_storage.list("models/finished/")}
    log = run_again(FINISHED)
    assert trained_epochs(log) == []
    assert {stored.key: stored.etag for stored in old_storage.list("models/finished/")} == before
