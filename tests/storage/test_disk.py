"""Room on local disks: asked for before it is taken, and a sentence where it ran out."""

import errno
import gc
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from topwork.artifacts import fetch_whole, write_whole
from topwork.cli.runtime.exit_codes import failure_of
from topwork.disk_space import full_disk, require_room, room_told, shown_bytes
from topwork.errors import DataError, SettingError, UnavailableError
from topwork.pipeline import run_pull

DISK_BYTES = 80 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 80 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("mounts a small disk: run as root (in a container with --cap-add SYS_ADMIN)")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, leave: int) -> None:
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, DISK_BYTES - leave)


def test_a_full_disk_is_told_with_its_place_and_is_worth_another_try(small_disk):
    fill(small_disk, leave=1 << 20)
    with pytest.raises(UnavailableError) as caught, room_told(small_disk):
        (small_disk / "file").write_bytes(bytes(2 << 20))
    assert str(caught.value) == (
        f"There is no room left in {small_disk} (0 B of 80.0 MiB free). Make room there, or take a larger disk (in a "
        "cluster spec.compute.scratch, a node with more), then start again: what is stored is kept."
    )


# s3transfer leaves the connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_download_to_a_full_disk_says_so_and_leaves_nothing(storage, small_disk):
    storage.write("big", bytes(3 << 20))
    fill(small_disk, leave=1 << 20)
    with pytest.raises(UnavailableError, match=f"^There is no room left in {small_disk} "):
        storage.download("big", small_disk / "big")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    gc.collect()


def test_a_folder_that_the_disk_can_not_hold_is_not_begun(storage, small_disk, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(3 << 20))
    write_whole(storage, "set", tmp_path / "folder", {})
    fill(small_disk, leave=2 << 20)
    with pytest.raises(UnavailableError) as caught:
        fetch_whole(storage, "set", small_disk / "set")
    assert str(caught.value) == (
        f"Fetching {storage.uri}/set takes about 3.0 MiB, and {small_disk}/set has 2.0 MiB free. Make room there, or "
        "take a larger disk or node, then start again."
    )
    assert list((small_disk / "set").iterdir()) == []


def test_what_is_there_already_needs_no_room(storage, small_disk, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(3 << 20))
    write_whole(storage, "set", tmp_path / "folder", {})
    fetch_whole(storage, "set", small_disk / "set")
    fill(small_disk, leave=3 << 20)
    fetch_whole(storage, "set", small_disk / "set")


def test_a_pull_that_the_scratch_volume_can_not_hold_is_refused_before_it_begins(make_job, workspace, two_class_folder):
    size = sum(path.stat().st_size for path in two_class_folder.rglob("*") if path.is_file())
    with pytest.raises(SettingError) as caught:
        run_pull(make_job(), replace(workspace, scratch_limit=size - 1))
    assert str(caught.value) == (
        f'Pulling {{"folder": {{"uri": "{two_class_folder}"}}}} takes about {shown_bytes(size)} of the scratch volume, '
        f"but spec.compute.scratch is {shown_bytes(size - 1)}. Raise it: the cluster ends a pod whose volume grows "
        "beyond it."
    )
    assert [stored.key for stored in workspace.storage.list("datasets/")] == []


def test_a_pull_that_the_disk_can_not_hold_is_refused_before_it_begins(make_job, workspace, small_disk):
    fill(small_disk, leave=1 << 20)
    with pytest.raises(UnavailableError, match=rf"^Pulling .* takes about .*, and {small_disk} has 1\.0 MiB free\."):
        run_pull(make_job(), replace(workspace, scratch=small_disk))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/scratch/file"), 75),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/scratch/file"), 2),
        # As HDF5 words it.
        (OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')"), 75),
    ],
)
def test_a_command_ends_with_the_code_of_a_full_disk(error, code):
    known = failure_of(error)
    assert known is not None
    assert known.exit_code == code


def test_a_full_disk_behind_another_error_is_found_and_other_errors_stay():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as full:
            raise RuntimeError("TFDS could not go on") from full
    except RuntimeError as error:
        assert isinstance(full_disk(error), UnavailableError)
    assert full_disk(OSError(errno.EACCES, "Permission denied")) is None
    assert full_disk(ValueError("No space left on device")) is None
    assert full_disk(DataError("told already")) is None


def test_room_that_is_there_is_granted(tmp_path):
    require_room(tmp_path, 1000, "Nothing much", limit=1000)
