"""Free disk space: checks before large writes, and error messages for a full disk."""

import errno
import gc
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from topwork.artifacts import download_artifact, write_artifact
from topwork.cli.runtime.shutdown import to_topwork_error
from topwork.data.images.decoding import Preprocessing
from topwork.data.local_dataset import Split, _fits_on_scratch
from topwork.data.sources import open_source
from topwork.disk_space import MARGIN_BYTES, disk_full_error, format_bytes, report_full_disk, require_free_space
from topwork.errors import DataError, SettingError, UnavailableError
from topwork.pipeline import run_pull
from topwork.registry.datasets import fingerprint_of

DISK_BYTES = 80 << 20


@pytest.fixture
def small_disk(mount_disk):
    """A tmpfs file system of 80 MiB."""
    return mount_disk(DISK_BYTES)


def fill_disk(disk: Path, free: int) -> None:
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, DISK_BYTES - free)


def test_full_disk_is_reported_as_unavailable_with_its_location(small_disk):
    fill_disk(small_disk, free=1 << 20)
    with pytest.raises(UnavailableError) as caught, report_full_disk(small_disk):
        (small_disk / "file").write_bytes(bytes(2 << 20))
    assert str(caught.value) == (
        f"No disk space is left in {small_disk} (0 B of 80.0 MiB free). Free space there, or use a larger disk (in a "
        "cluster, spec.compute.scratch or another node), then start again: stored data is kept."
    )


# s3transfer leaves closing the connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_download_to_a_full_disk_fails_and_leaves_no_partial_file(storage, small_disk):
    storage.write("big", bytes(3 << 20))
    fill_disk(small_disk, free=1 << 20)
    with pytest.raises(UnavailableError, match=f"^No disk space is left in {small_disk} "):
        storage.download("big", small_disk / "big")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    gc.collect()


def test_download_of_an_artifact_larger_than_the_disk_does_not_start(storage, small_disk, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "file").write_bytes(bytes(3 << 20))
    write_artifact(storage, "set", tmp_path / "files", {})
    fill_disk(small_disk, free=2 << 20)
    with pytest.raises(UnavailableError) as caught:
        download_artifact(storage, "set", small_disk / "set")
    assert str(caught.value) == (
        f"Downloading {storage.uri}/set needs about 3.0 MiB, but {small_disk}/set has 2.0 MiB free. Free space there, "
        "or use a larger disk or another node, then start again."
    )
    assert list((small_disk / "set").iterdir()) == []


def test_existing_files_need_no_free_space(storage, small_disk, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "file").write_bytes(bytes(3 << 20))
    write_artifact(storage, "set", tmp_path / "files", {})
    download_artifact(storage, "set", small_disk / "set")
    fill_disk(small_disk, free=3 << 20)
    download_artifact(storage, "set", small_disk / "set")


def test_incomplete_files_of_a_killed_download_do_not_count_as_used_space(storage, small_disk, tmp_path):
    (tmp_path / "files").mkdir()
    for name in ("one", "two"):
        (tmp_path / "files" / name).write_bytes(bytes(3 << 20))
    write_artifact(storage, "set", tmp_path / "files", {})
    (small_disk / "set").mkdir()
    fill_disk(small_disk, free=71 << 20)
    (small_disk / "set" / "one.part").write_bytes(bytes(2 << 20))
    (small_disk / "set" / "two").write_bytes(bytes(1 << 20))
    download_artifact(storage, "set", small_disk / "set")
    assert sorted(path.stat().st_size for path in (small_disk / "set").iterdir()) == [3 << 20, 3 << 20]


class Started(Exception):
    """The check of the disk space is passed, and images would be read now."""


@pytest.fixture
def stop_before_images_are_read(monkeypatch):
    def start(*_):
        raise Started

    monkeypatch.setattr("topwork.stages.pull._write_dataset", start)


@pytest.mark.usefixtures("stop_before_images_are_read")
def test_images_of_a_killed_pull_do_not_count_as_used_space(make_job, workspace, small_disk):
    scratch = replace(workspace, scratch=small_disk)
    job = make_job()
    fingerprint = fingerprint_of(open_source(job.spec.dataset.source, scratch), job.spec.dataset)
    (small_disk / "pull" / fingerprint).mkdir(parents=True)
    (small_disk / "pull" / fingerprint / "images").write_bytes(bytes(12 << 20))
    fill_disk(small_disk, free=70 << 20)
    with pytest.raises(Started):
        run_pull(job, scratch)


@pytest.mark.usefixtures("stop_before_images_are_read")
def test_archive_that_is_downloaded_already_is_not_counted_twice(
    make_job, workspace, small_disk, two_class_folder, tmp_path
):
    (two_class_folder / "readme.bin").write_bytes(bytes(2 << 20))
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(two_class_folder, ".")
    size = (tmp_path / "photos.tar").stat().st_size
    workspace.storage.upload(tmp_path / "photos.tar", "photos.tar")
    dataset = make_job().spec.dataset.model_dump(by_alias=True, mode="json", exclude_unset=True)
    dataset["source"] = {"archive": {"uri": workspace.storage.uri_of("photos.tar")}}
    (small_disk / "pull").mkdir()
    (small_disk / "pull" / "archive").write_bytes(bytes(size))  # of a killed pull
    needed = 2 * size + MARGIN_BYTES
    fill_disk(small_disk, free=needed + size // 2)
    assert shutil.disk_usage(small_disk).free < needed
    with pytest.raises(Started):
        run_pull(make_job(dataset=dataset), replace(workspace, scratch=small_disk))


def test_pull_larger_than_the_scratch_limit_does_not_start(make_job, workspace, two_class_folder):
    size = sum(path.stat().st_size for path in two_class_folder.rglob("*") if path.is_file())
    with pytest.raises(SettingError) as caught:
        run_pull(make_job(), replace(workspace, scratch_limit=size - 1))
    assert str(caught.value) == (
        f'Pulling {{"folder": {{"uri": "{two_class_folder}"}}}} needs about {format_bytes(size)} of the scratch '
        f"volume, but spec.compute.scratch is {format_bytes(size - 1)}. Increase it: the cluster evicts a pod whose "
        "volume exceeds its limit."
    )
    assert [stored.key for stored in workspace.storage.list("datasets/")] == []


def test_only_selected_images_of_an_archive_need_space(make_job, workspace, two_class_folder, tmp_path):
    shutil.copytree(two_class_folder / "red", two_class_folder / "pink")
    archive = shutil.make_archive(str(tmp_path / "photos"), "tar", two_class_folder)
    needed = sum(path.stat().st_size for name in ("blue", "red") for path in (two_class_folder / name).iterdir())
    dataset = make_job().spec.dataset.model_dump(by_alias=True, mode="json", exclude_unset=True)
    dataset |= {"source": {"archive": {"uri": archive}}, "classes": ["red", "blue"]}
    with pytest.raises(SettingError, match=rf"needs about {format_bytes(needed)} of the scratch volume"):
        run_pull(make_job(dataset=dataset), replace(workspace, scratch_limit=needed - 1))
    assert run_pull(make_job(dataset=dataset), replace(workspace, scratch_limit=needed)).metadata.images == 40


def test_pull_larger_than_the_free_disk_space_does_not_start(make_job, workspace, small_disk):
    fill_disk(small_disk, free=1 << 20)
    with pytest.raises(UnavailableError, match=rf"^Pulling .* needs about .*, but {small_disk} has 1\.0 MiB free\."):
        run_pull(make_job(), replace(workspace, scratch=small_disk))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/scratch/file"), 75),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/scratch/file"), 2),
        # The wording of HDF5.
        (OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')"), 75),
    ],
)
def test_full_disk_and_an_exhausted_quota_have_different_exit_codes(error, code):
    reported = to_topwork_error(error)
    assert reported is not None
    assert reported.exit_code == code


def test_disk_full_error_inspects_causes_and_ignores_other_errors():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as full:
            raise RuntimeError("TFDS failed") from full
    except RuntimeError as error:
        assert isinstance(disk_full_error(error), UnavailableError)
    assert disk_full_error(OSError(errno.EACCES, "Permission denied")) is None
    assert disk_full_error(ValueError("No space left on device")) is None
    assert disk_full_error(DataError("already reported")) is None


def test_require_free_space_accepts_sufficient_space(tmp_path):
    require_free_space(tmp_path, 1000, "Writing", limit=1000)


def test_resized_images_of_an_earlier_stage_do_not_count_as_used_space(make_job, small_disk):
    records = SimpleNamespace(labels=np.zeros(2048, np.int64))
    split = Split(records, np.arange(1024), (128, 128), Preprocessing())  # 48 MiB of pixels
    job = make_job()
    assert _fits_on_scratch([split], small_disk, job)
    split.pixel_file(small_disk).write_bytes(bytes(1024 * 128 * 128 * 3))
    assert split.has_cached_pixels(small_disk)
    assert _fits_on_scratch([split], small_disk, job)
    # Files that still have to be written do need free space.
    other = Split(records, np.arange(1024, 2048), (128, 128), Preprocessing())
    assert not _fits_on_scratch([split, other], small_disk, job)
    # Another division of the same images, as in another fold, uses the same file.
    parts = np.split(np.arange(1024)[::-1], [700])
    halves = [Split(records, positions, (128, 128), Preprocessing()) for positions in parts]
    assert _fits_on_scratch(halves, small_disk, job)
