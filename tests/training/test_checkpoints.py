"""Checkpoints that cannot be stored: reported at once, tried again, and an error of the stage if that persists."""

from dataclasses import replace

import numpy as np
import pytest
from structlog.testing import capture_logs
from tests.faults import proxy as faults
from tests.faults.proxy import Fault, run_proxy

from topwork.clients.s3.storage import Storage
from topwork.errors import SettingError, UnavailableError
from topwork.training.checkpointing import checkpoints as module
from topwork.training.checkpointing.checkpoints import Checkpoint, Checkpoints
from topwork.training.checkpointing.train_state import TrainState
from topwork.training.checkpointing.write_failures import WriteFailures

MINUTES = 10.0
DISK_BYTES = 4 << 20


class Clock:
    """A clock that stands still until a test advances it."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_checkpoints(workspace, clock):
    """Open the checkpoints of a stage; keyword arguments replace fields of the workspace."""

    def open_(**fields):
        return Checkpoints(replace(workspace, **fields), "stage", MINUTES, clock)

    return open_


def make_checkpoint(epoch, size=100):
    values = {"model": [np.full(size, epoch, np.float32)], "optimizer": [np.zeros(2, np.float32)], "best": []}
    return Checkpoint(TrainState(epoch=epoch), values)


def save(checkpoints, epoch, **options):
    """Save a checkpoint and wait for the attempt; returns the warnings."""
    with capture_logs() as events:
        checkpoints.save(make_checkpoint(epoch, **options))
        checkpoints.wait()
    return [event for event in events if event["log_level"] == "warning"]


def stored_names(storage):
    keys = (stored.key for stored in storage.list("stage/checkpoints/"))
    return sorted(key.split("/")[2] for key in keys if key.endswith("manifest.json"))


@pytest.fixture
def small_disk(mount_disk):
    """A tmpfs file system of 4 MiB."""
    return mount_disk(DISK_BYTES)


def test_full_disk_is_reported_and_the_next_checkpoint_is_stored(open_checkpoints, small_disk, storage):
    with open_checkpoints(scratch=small_disk) as checkpoints:
        filler = small_disk / "filler"
        filler.write_bytes(bytes(DISK_BYTES - (64 << 10)))
        for epoch in (1, 2):
            (warning,) = save(checkpoints, epoch, size=1 << 18)
            assert warning["event"] == "checkpoint not stored"
            assert (warning["checkpoint"], warning["failed_attempts"]) == (f"{epoch:05}", epoch)
            assert "No disk space is left" in warning["reason"]
        assert [path.name for path in small_disk.iterdir()] == ["filler"]
        filler.unlink()
        assert save(checkpoints, 3, size=1 << 18) == []
    assert stored_names(storage) == ["00003"]
    with open_checkpoints() as again:
        assert again.newest().state.epoch == 3


def test_files_of_a_killed_process_are_deleted_from_scratch(open_checkpoints, workspace):
    (workspace.scratch / "checkpoint-abc").mkdir()
    (workspace.scratch / "checkpoint-abc" / "state.npz").write_bytes(b"half")
    with open_checkpoints() as checkpoints:
        assert checkpoints.newest() is None
    assert list(workspace.scratch.iterdir()) == []


def test_missing_scratch_directory_is_reported_and_recovered_from(open_checkpoints, storage, tmp_path):
    scratch = tmp_path / "unmounted"
    with open_checkpoints(scratch=scratch) as checkpoints:
        (warning,) = save(checkpoints, 1)
        assert warning["reason"].startswith("FileNotFoundError: ")
        scratch.write_bytes(b"")  # a file in its place
        assert save(checkpoints, 2)[0]["reason"].startswith("NotADirectoryError: ")
        scratch.unlink()
        scratch.mkdir()
        assert save(checkpoints, 3) == []
    assert stored_names(storage) == ["00003"]


@pytest.mark.parametrize(
    "error", [TypeError("not a number"), MemoryError(), RuntimeError("can't start new thread"), SystemExit()]
)
def test_unexpected_error_is_reported_with_its_traceback_and_recovered_from(
    open_checkpoints, storage, monkeypatch, error
):
    def fail(*_):
        raise error

    with open_checkpoints() as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr(module, "write_checkpoint", fail)
            (warning,) = save(checkpoints, 1)
        assert warning["reason"].startswith(type(error).__name__)
        assert not warning["reason"].endswith(": ")
        assert warning["exc_info"] is error
        assert save(checkpoints, 2) == []
        checkpoints.clear()
    assert stored_names(storage) == []


@pytest.mark.parametrize(
    "response",
    [
        faults.error(507, "InsufficientStorage", "No space."),
        faults.error(500, "InternalError", "Try again."),
        faults.reset,
    ],
    ids=["507", "500", "reset"],
)
def test_storage_failure_is_reported_and_the_next_checkpoint_is_stored(open_checkpoints, s3_settings, response):
    with run_proxy(str(s3_settings.endpoint_url)) as proxy:
        proxy.set_fault(Fault("outage", response, lambda request: request.method in {"PUT", "POST"}))
        storage = Storage("s3://topwork-test/outage", proxy.settings(s3_settings))
        with open_checkpoints(storage=storage) as checkpoints:
            (warning,) = save(checkpoints, 1)
            assert (warning["event"], warning["checkpoint"]) == ("checkpoint not stored", "00001")
            proxy.set_fault(None)
            assert save(checkpoints, 2) == []
            assert stored_names(storage) == ["00002"]
            checkpoints.clear()


def test_failed_checkpoint_is_tried_again_soon(open_checkpoints, clock, tmp_path):
    scratch = tmp_path / "unmounted"
    with open_checkpoints(scratch=scratch) as checkpoints:
        save(checkpoints, 1)
        clock.seconds += module.RETRY_SECONDS - 1
        assert not checkpoints.is_due
        clock.seconds += 1
        assert checkpoints.is_due
        scratch.mkdir()
        save(checkpoints, 2)
        clock.seconds += 2 * module.RETRY_SECONDS
        assert not checkpoints.is_due


def test_stage_fails_if_no_checkpoint_can_be_stored_for_three_intervals(open_checkpoints, clock, tmp_path):
    with open_checkpoints(scratch=tmp_path / "unmounted") as checkpoints:
        for epoch in range(1, 5):
            save(checkpoints, epoch)
            clock.seconds += 9.9 * 60
        with pytest.raises(UnavailableError) as caught:
            checkpoints.save(make_checkpoint(5))
    assert caught.value.exit_code == 75
    assert str(caught.value).startswith(
        "No checkpoint could be stored in 4 attempts over 40 minutes, so all work since then would be lost if this "
        "process ended. What was stored before is kept: start the same job again to resume. Last error: "
        "FileNotFoundError: "
    )


def test_two_failed_attempts_never_fail_a_stage(open_checkpoints, clock, tmp_path):
    with open_checkpoints(scratch=tmp_path / "unmounted") as checkpoints:
        save(checkpoints, 1)
        clock.seconds += 24 * 3600
        save(checkpoints, 2)
        clock.seconds += 24 * 3600
        save(checkpoints, 3)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SettingError("Quota."), SettingError),
        (UnavailableError("Down."), UnavailableError),
        (ValueError(), UnavailableError),
    ],
)
def test_persistent_failure_keeps_the_exit_code_of_its_cause(clock, error, kind):
    failures = WriteFailures("checkpoint", 0.001, clock)
    for _ in range(3):
        failures.check()
        failures.record_failure(error, clock())
    clock.seconds += 1
    with pytest.raises(kind, match=r"^No checkpoint could be stored in 3 attempts"):
        failures.check()
    failures.record_success()
    failures.check()


def test_failure_to_delete_old_checkpoints_does_not_count_as_a_failed_checkpoint(
    open_checkpoints, s3_settings, storage
):
    with run_proxy(str(s3_settings.endpoint_url)) as proxy:
        response = faults.error(501, "NotImplemented", "No such operation.")
        proxy.set_fault(Fault("no deletion", response, lambda request: request.method in {"POST", "DELETE"}))
        proxied = Storage(storage.uri, proxy.settings(s3_settings))
        with open_checkpoints(storage=proxied) as checkpoints:
            assert [save(checkpoints, epoch) for epoch in (1, 2)] == [[], []]
            (warning,) = save(checkpoints, 3)
            assert warning["event"] == "old checkpoints not deleted"
            assert not checkpoints._failures.is_failing
            with capture_logs() as events:
                checkpoints.clear()
            assert [event["event"] for event in events] == ["checkpoints not deleted"]
            assert stored_names(storage) == ["00001", "00002", "00003"]
            proxy.set_fault(None)
            assert save(checkpoints, 4) == []
    assert stored_names(storage) == ["00003", "00004"]


def test_checkpoint_of_a_stop_request_is_tried_twice(open_checkpoints, storage, monkeypatch):
    errors, write = [OSError("Input/output error")], module.write_checkpoint

    def fail_once(*arguments):
        if errors:
            raise errors.pop()
        write(*arguments)

    monkeypatch.setattr(module, "write_checkpoint", fail_once)
    with open_checkpoints() as checkpoints:
        checkpoints.save_now(make_checkpoint(1))
    assert stored_names(storage) == ["00001"]


def test_checkpoint_of_a_stop_request_that_cannot_be_stored_is_an_error(open_checkpoints, tmp_path):
    with (
        open_checkpoints(scratch=tmp_path / "unmounted") as checkpoints,
        pytest.raises(UnavailableError, match=r"^The checkpoint could not be stored: FileNotFoundError: .* Earlier"),
    ):
        checkpoints.save_now(make_checkpoint(1))


def test_ends_of_short_epochs_store_a_checkpoint_once_a_minute(open_checkpoints, clock):
    with open_checkpoints() as checkpoints:
        due = []
        for epoch in range(1, 13):
            clock.seconds += 25
            if checkpoints.is_due_after_epoch:
                due.append(epoch)
                checkpoints.save(make_checkpoint(epoch))
        assert due == [3, 6, 9, 12]
        clock.seconds += 60
        assert checkpoints.is_due_after_epoch
        assert not checkpoints.is_due


def test_end_of_an_epoch_is_due_as_often_as_the_spec_requests(workspace, clock):
    with Checkpoints(workspace, "stage", 0.1, clock) as checkpoints:
        checkpoints.save(make_checkpoint(1))
        clock.seconds += 5.9
        assert not checkpoints.is_due_after_epoch
        clock.seconds += 0.2
        assert checkpoints.is_due_after_epoch
