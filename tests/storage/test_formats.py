"""Records written by another version of topwork cause a clear error, never a traceback."""

import json

import pytest

from topwork import __version__
from topwork.data.dataset_manifest import DatasetMetadata, StoredDataset
from topwork.errors import DataError
from topwork.registry import stage_results, versions
from topwork.stages.publish import find_published
from topwork.stages.pull import find_pulled_dataset

PUBLISHED = {"name": "tiny", "version": 1, "uri": "s3://…", "report_uri": "s3://…", "metrics": {}, "split": "test",
             "images": 1}  # fmt: skip


DATASET = StoredDataset(
    "datasets/photos/aaaa",
    DatasetMetadata(
        name="photos", fingerprint="aaaa", source={}, class_names=("cat", "dog"), splits={}, images=1, rejected=(),
        duplicates=0,
    ),
)  # fmt: skip


def read_stage_record(job, workspace, content):
    workspace.storage.write("stages/transfer/aaaa/done.json", content)
    return stage_results.read_stage_result(workspace.storage, "transfer", "aaaa")


def read_pull_record(job, workspace, content):
    workspace.storage.write(f"runs/{job.run}/pull/done.json", content)
    return find_pulled_dataset(job, workspace)


def read_publish_record(job, workspace, content):
    workspace.storage.write(f"runs/{job.run}/publish/done.json", content)
    return find_published(job, DATASET, workspace)


def read_latest_pointer(job, workspace, content):
    workspace.storage.write("models/tiny/latest.json", content)
    return versions.read_latest(workspace.storage, "tiny")


@pytest.mark.parametrize("read", [read_pull_record, read_stage_record, read_publish_record, read_latest_pointer])
@pytest.mark.parametrize(("record_format", "age"), [(2, "a newer"), (0, "an older")])
def test_record_of_another_format_names_the_version_to_use(make_job, workspace, read, record_format, age):
    with pytest.raises(DataError) as caught:
        read(make_job(), workspace, json.dumps({"format": record_format}).encode())
    message = f"has format {record_format}, but topwork {__version__} reads format 1. Read it with {age} topwork"
    assert message in str(caught.value)
    assert str(caught.value).startswith(workspace.storage.uri)


@pytest.mark.parametrize("read", [read_pull_record, read_stage_record, read_publish_record, read_latest_pointer])
@pytest.mark.parametrize("content", [b"", b"no JSON", b"[]", b"{}", b'{"format": "one"}', b"\xff\xfe", b"null"])
def test_invalid_record_is_reported(make_job, workspace, read, content):
    with pytest.raises(DataError, match=rf"^{workspace.storage.uri}/.*\.json is not "):
        read(make_job(), workspace, content)


@pytest.mark.parametrize("read", [read_pull_record, read_stage_record, read_publish_record])
def test_error_for_an_unreadable_run_suggests_restart(make_job, workspace, read):
    for content in (b"{}", b'{"format": 2}'):
        with pytest.raises(DataError, match="start over with --restart"):
            read(make_job(), workspace, content)


def test_record_without_format_is_read(make_job, workspace):
    job = make_job()
    workspace.storage.write(f"runs/{job.run}/publish/done.json", json.dumps(PUBLISHED).encode())
    # The record is valid, but its version is missing, so the run publishes again.
    assert find_published(job, DATASET, workspace) is None


def test_manifest_without_dataset_is_reported(make_job, workspace):
    manifest = {"format": 1, "files": {}, "facts": {"name": "photos"}}
    workspace.storage.write("datasets/photos/aaaa/manifest.json", json.dumps(manifest).encode())
    done = json.dumps({"format": 1, "dataset": "datasets/photos/aaaa"}).encode()
    with pytest.raises(DataError, match=r"datasets/photos/aaaa does not describe a topwork dataset: Field required"):
        read_pull_record(make_job(), workspace, done)


LATEST = {"format": 1, "name": "tiny", "version": 3, "uri": "s3://…", "run": "tiny-1", "weights": "0" * 64,
          "published": "2026-01-01T00:00:00Z", "main_metric": "accuracy", "metrics": {}, "split": "test",
          "images": 1}  # fmt: skip


def test_unknown_keys_of_a_record_are_ignored(workspace):
    content = {**LATEST, "added_by_a_later_version": {"key": [1]}}
    workspace.storage.write("models/tiny/latest.json", json.dumps(content).encode())
    latest = versions.read_latest(workspace.storage, "tiny")
    assert latest is not None
    assert latest.version == 3


@pytest.mark.parametrize("number", ["2", "1", 1.0, True, None, [1]])
def test_format_that_is_not_an_integer_is_reported(workspace, number):
    workspace.storage.write("models/tiny/latest.json", json.dumps({**LATEST, "format": number}).encode())
    with pytest.raises(DataError, match=r"is not a model published by topwork .*, expected an integer"):
        versions.read_latest(workspace.storage, "tiny")


def test_claim_of_another_format_is_not_reused(storage):
    claim = {"format": 2, "run": "tiny-1", "claimed": "2026-01-01T00:00:00Z", "attempt": "0"}
    storage.write("models/tiny/1/claim.json", json.dumps(claim).encode())
    assert versions.claim_version(storage, "tiny", "tiny-1") == 2
    storage.write("models/tiny/3/claim.json", json.dumps({**claim, "format": 1}).encode())
    assert versions.claim_version(storage, "tiny", "tiny-1") in {2, 3}
