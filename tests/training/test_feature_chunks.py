"""Stored chunks of cached features: one that cannot be stored is reported at once and tried again, in order."""

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


def values_of(unit, rows=ROWS):
    return np.arange(unit * ROWS, unit * ROWS + rows, dtype=np.float16)[:, np.newaxis] + np.zeros(3, np.float16)


def write_chunks(chunks, count, first=0):
    for unit in range(first, first + count):
        chunks.write(unit, values_of(unit))


def read_rows(storage):
    rows = []
    with FeatureChunks(storage, "features/train", 10.0) as chunks:
        unit = 0
        while (values := chunks.find(unit, (3,), np.dtype(np.float16))) is not None:
            rows += values[:, 0].tolist()
            unit += 1
    return rows


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
            write_chunks(chunks, 2, first=3)
        warnings = warnings_of(events)
        assert {warning["event"] for warning in warnings} == {"features not stored"}
        assert {warning["unit"] for warning in warnings} == {0}
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
    assert (warning["unit"], warning["failed_attempts"], warning["exc_info"]) == (0, 1, error)
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


def test_stored_units_are_announced_once(storage):
    with FeatureChunks(storage, "features/train", 10.0) as chunks:
        write_chunks(chunks, 2)
        chunks.write(5, values_of(5))
        announced = []
        while len(announced) < 3:
            announced += chunks.take_stored()
        assert (announced, chunks.take_stored()) == ([0, 1, 5], [])


def test_unit_that_others_wait_for_is_tried_again_after_a_while(storage, monkeypatch):
    errors, write, now = [OSError("Input/output error")], Storage.write, [0.0]

    def fail_once(*arguments):
        if errors:
            raise errors.pop()
        return write(*arguments)

    monkeypatch.setattr(Storage, "write", fail_once)
    with FeatureChunks(storage, "features/train", 10.0, clock=lambda: now[0]) as chunks:
        write_chunks(chunks, 1)
        while not chunks._failures.is_failing:
            pass
        chunks.retry()
        assert chunks._running is None
        now[0] += 11.0
        chunks.retry()
        while not (announced := chunks.take_stored()):
            pass
        assert announced == [0]


def test_units_of_other_shapes_and_types_and_damaged_ones_are_not_found(storage):
    with FeatureChunks(storage, "features/train", 10.0) as chunks:
        write_chunks(chunks, 1)
    storage.write("features/train/000001.npy", b"\x93NUMPY damaged")
    with FeatureChunks(storage, "features/train", 10.0) as chunks:
        np.testing.assert_array_equal(chunks.find(0, (3,), np.dtype(np.float16)), values_of(0))
        assert chunks.find(0, (4,), np.dtype(np.float16)) is None
        assert chunks.find(0, (3,), np.dtype(np.float32)) is None
        assert chunks.find(1, (3,), np.dtype(np.float16)) is None
        assert chunks.find(2, (3,), np.dtype(np.float16)) is None
