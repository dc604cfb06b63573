"""Pods that are evicted for lack of disk space: the exit code decides whether the Job counts it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from topwork.cancellation import StopInterrupt, StopRequest
from topwork.cli.runtime.container import Container
from topwork.cli.runtime.eviction import eviction_error
from topwork.cluster.termination_message import parse_termination_message
from topwork.errors import SettingError, Stopped, UnavailableError

MEBIBYTE = 2**20
GIBIBYTE = 2**30


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A scratch volume with three MiB in two directories."""
    directory = tmp_path / "scratch"
    (directory / "run" / "images").mkdir(parents=True)
    (directory / "run" / "images" / "a.tfrecord").write_bytes(b"x" * 2 * MEBIBYTE)
    (directory / "cache.bin").write_bytes(b"x" * MEBIBYTE)
    return directory


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch):
    """Function that sets the free share of the disk of the node."""

    def set_free(share: float) -> None:
        usage = SimpleNamespace(total=100 * GIBIBYTE, used=0, free=int(share * 100 * GIBIBYTE))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    set_free(0.5)
    return set_free


def test_volume_above_its_limit_is_a_setting_error(scratch, disk):
    error = eviction_error(scratch, 2 * MEBIBYTE, 0.2)
    assert isinstance(error, SettingError)
    assert str(error) == (
        f"{scratch} contains 3.0 MiB, more than spec.compute.scratch allows (2.0 MiB): the cluster evicts the pod. "
        "Raise spec.compute.scratch."
    )


@pytest.mark.parametrize("share", [0.0, 0.05, 0.149])
def test_nearly_full_disk_of_the_node_is_retried_and_counted(scratch, disk, share):
    disk(share)
    error = eviction_error(scratch, GIBIBYTE, 0.2)
    assert isinstance(error, UnavailableError)
    assert f"({100 * share:.1f} GiB of 100.0 GiB free)" in str(error).replace("0 B of", "0.0 GiB of")


@pytest.mark.parametrize(("share", "seconds"), [(0.5, 0.2), (0.15, 0.2), (0.05, 2.1)])
def test_other_stops_are_no_evictions(scratch, disk, share, seconds):
    disk(share)
    assert eviction_error(scratch, GIBIBYTE, seconds) is None


def test_stopped_container_exits_with_the_code_of_the_eviction(scratch, disk, tmp_path):
    log = tmp_path / "termination-log"
    log.touch()
    container = Container("pull", log)
    container.eviction_error = lambda: eviction_error(scratch, MEBIBYTE, 0.1)
    assert container.report_failure(Stopped("Stopped.")) == 2
    message = parse_termination_message(log.read_text())
    assert message
    assert (message.outcome, message.exit_code) == ("failed", 2)
    assert "Raise spec.compute.scratch" in (message.error or "")


def test_other_failures_keep_their_exit_code(scratch, disk, tmp_path):
    container = Container("pull", tmp_path / "termination-log")
    container.eviction_error = lambda: eviction_error(scratch, MEBIBYTE, 0.1)
    assert container.report_failure(UnavailableError("no answer")) == 75


def test_time_since_a_stop_request_starts_with_the_first():
    stop = StopRequest()
    assert stop.seconds_since_request() is None
    for _ in range(2):
        with pytest.raises(StopInterrupt):
            stop.set()
    first = stop.seconds_since_request()
    assert first is not None
    with pytest.raises(StopInterrupt):
        stop.set()
    assert (stop.seconds_since_request() or 0.0) >= first
