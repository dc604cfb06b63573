"""Records written by another version of topwork cause a clear error, never a traceback."""

import json

import pytest

from topwork import __version__
from topwork.errors import DataError
from topwork.registry import versions
from topwork.stages.publish import read_published
from topwork.stages.pull import find_pulled_dataset

PUBLISHED = {"name": "tiny", "version": 1, "uri": "s3://…", "report_uri": "s3://…", "metrics": {}, "split": "test",
             "images": 1}  # fmt: skip


def read_pull_record(job, workspace, content):
    workspace.storage.write(f"runs/{job.run}/pull/done.json", content)
    return find_pulled_dataset(job, workspace)


def read_publish_record(job, workspace, content):
    workspace.storage.write(f"runs/{job.run}/publish/done.json", content)
    return read_published(job, workspace.storage)


def read_latest_pointer(job, workspace, content):
    workspace.storage.write("models/tiny/latest.json", content)
    return versions.read_latest(workspace.storage, "tiny")


@pytest.mark.parametrize("read", [read_pull_record, read_publish_record, read_latest_pointer])
@pytest.mark.parametrize(("record_format", "age"), [(2, "a newer"), (0, "an older")])
def test_record_of_another_format_names_the_version_to_use(make_job, workspace, read, record_format, age):
    with pytest.raises(DataError) as caught:
        read(make_job(), workspace, json.dumps({"format": record_format}).encode())
    message = f"has format {record_format}, but topwork {__version__} reads format 1. Read it with {age} topwork"
    assert message in str(caught.value)
    assert str(caught.value).startswith(workspace.storage.uri)


@pytest.mark.parametrize("read", [read_pull_record, read_publish_record, read_latest_pointer])
@pytest.mark.parametrize("content", [b"", b"no JSON", b"[]", b"{}", b'{"format": "one"}', b"\xff\xfe", b"null"])
def test_invalid_record_is_reported(make_job, workspace, read, content):
    with pytest.raises(DataError, match=rf"^{workspace.storage.uri}/.*\.json is not "):
        read(make_job(), workspace, content)


@pytest.mark.parametrize("read", [read_pull_record, read_publish_record])
def test_error_for_an_unreadable_run_suggests_restart(make_job, workspace, read):
    for content in (b"{}", b'{"format": 2}'):
        with pytest.raises(DataError, match="start over with --restart"):
            read(make_job(), workspace, content)


def test_record_without_format_is_read(make_job, workspace):
    job = make_job()
    workspace.storage.write(f"runs/{job.run}/publish/done.json", json.dumps(PUBLISHED).encode())
    # The record is valid, but its version is missing, so the run publishes again.
    assert read_published(job, workspace.storage) is None


def test_manifest_without_dataset_is_reported(make_job, workspace):
    manifest = {"format": 1, "files": {}, "facts": {"name": "photos"}}
    workspace.storage.write("datasets/photos/aaaa/manifest.json", json.dumps(manifest).encode())
    done = json.dumps({"format": 1, "dataset": "datasets/photos/aaaa"}).encode()
    with pytest.raises(DataError, match=r"datasets/photos/aaaa does not describe a topwork dataset: Field required"):
        read_pull_record(make_job(), workspace, done)
