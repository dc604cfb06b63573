"""Stored chunks of cached features: a chunk that cannot be stored is reported at once and tried again, in order."""

import numpy as np
import pytest
from structlog.testing import capture_logs
from tests.conftest import BUCKET
from tests.faults import proxy as faults
from tests.faults.proxy import Fault, run_proxy

from topwork.clients.s3.storage import Storage
from topwork.errors import UnavailableError
from topwork.training.feature_cache.chunks import FeatureChunks

ROWS = 4


def rows_from(row):
    return np.arange(row, row + ROWS, dtype=np.float16)[:, np.newaxis] + np.zeros(3, np.float16)


def write_chunks(chunks, count, first=0):
    for row in range(first, first + count * ROWS, ROWS):
        chunks.write(row, rows_from(row))


def read_rows(storage):
    with FeatureChunks(storage, "features/train", 10.0) as chunks:
        return [float(row[0]) for chunk in chunks.read((3,), np.dtype(np.float16)) for row in chunk]


def warnings_of(events):
    return [event for event in events if event["log_level"] == "warning"]


@pytest.mark.parametrize(
    "response",
    [faults.error(507, "InsufficientStorage", "No space."), faults.error(500, "InternalError", "Try again.")],
    ids=["507", "500"],
)
def test_chunks_that_storage_rejected_are_stored_later(s3_settings, tmp_path, response):
    with run_proxy(str(s3_settings.endpoint_url)) as proxy:
        proxy.set_fault(Fault("outage", response, lambda request: request.method == "PUT"))
        storage = Storage(f"s3://{BUCKET}/{tmp_path.name}", proxy.settings(s3_settings))
        with capture_logs() as events, FeatureChunks(storage, "features/train", 10.0) as chunks:
            write_chunks(chunks, 3)
            while len(warnings_of(events)) < 2:  # the attempts of the background thread
                chunks._start()
            proxy.set_fault(None)
            write_chunks(chunks, 2, first=3 * ROWS)
        warnings = warnings_of(events)
        assert {warning["event"] for warning in warnings} == {"features not stored"}
        assert {warning["row"] for warning in warnings} == {0}
        assert read_rows(storage) == list(range(5 * ROWS))


@pytest.mark.parametrize("error", [OSError("Input/output error"), MemoryError(), TypeError("not a number")])
def test_unexpected_error_is_reported_at_once_and_the_chunk_is_tried_again(storage, monkeypatch, error):
    errors, write = [error], Storage.write

    def fail_once(*arguments):
        if errors:
            raise errors.pop()
        return write(*arguments)

    monkeypatch.setattr(Storage, "write", fail_once)
    with capture_logs() as events, FeatureChunks(storage, "features/train", 10.0) as chunks:
        write_chunks(chunks, 3)
    (warning,) = warnings_of(events)
    assert (warning["row"], warning["failed_attempts"], warning["exc_info"]) == (0, 1, error)
    assert read_rows(storage) == list(range(3 * ROWS))


def test_failure_of_the_last_chunk_is_reported_and_tried_again_once(storage, monkeypatch):
    def fail(*_):
        raise OSError("Input/output error")

    monkeypatch.setattr(Storage, "write", fail)
    with capture_logs() as events, FeatureChunks(storage, "features/train", 10.0) as chunks:
        write_chunks(chunks, 1)
    assert 1 <= len(warnings_of(events)) <= 2
    monkeypatch.undo()
    assert read_rows(storage) == []


def test_persistent_failure_fails_the_stage(storage, monkeypatch):
    def fail(*_):
        raise OSError("Input/output error")

    monkeypatch.setattr(Storage, "write", fail)
    with (
        pytest.raises(UnavailableError, match=r"^No features could be stored in \d+ attempts") as caught,
        FeatureChunks(storage, "features/train", 1e-9) as chunks,
    ):
        write_chunks(chunks, 10_000)
    assert caught.value.exit_code == 75
