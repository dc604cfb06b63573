"""Weights in a `.keras` file are read in place, or unpacked next to the file: /tmp of a pod is small."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from topwork.errors import UnavailableError
from topwork.model.files.inspection import inspect_keras_file

VALUES = np.random.default_rng(0).normal(size=1 << 20)
DISK_BYTES = 80 << 20


@pytest.fixture
def small_temporary_directory(tmp_path, monkeypatch):
    """A directory for temporary files of 1 MiB, and another directory on a disk of 80 MiB."""
    directories = []
    for name, size in (("tmp", 1 << 20), ("scratch", DISK_BYTES)):
        directories.append(tmp_path / name)
        directories[-1].mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directories[-1])]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("needs to mount a small disk: run as root (in a container with --cap-add SYS_ADMIN)")
    monkeypatch.setattr("tempfile.tempdir", str(directories[0]))
    yield directories[1]
    for directory in directories:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def write_keras_file(path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a `.keras` file with 8 MiB of weights."""
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file["layers/dense/vars/0"] = VALUES
        file["layers/dense/vars/1"] = VALUES[:3]
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.10.0"}')
        archive.writestr("config.json", "{}")
        archive.write(path.with_suffix(".h5"), "model.weights.h5")
    path.with_suffix(".h5").unlink()
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_weights_larger_than_the_temporary_directory_are_read(small_temporary_directory, compression):
    file = inspect_keras_file(write_keras_file(small_temporary_directory / "a.keras", compression))
    assert file.values == VALUES.size + 3
    with file.open_weights() as weights:
        np.testing.assert_array_equal(weights["layers/dense/vars/0"][()], VALUES)
    assert [path.name for path in small_temporary_directory.iterdir()] == ["a.keras"]


def test_stored_weights_need_no_free_space(small_temporary_directory):
    path = write_keras_file(small_temporary_directory / "a.keras")
    free = shutil.disk_usage(small_temporary_directory).free
    (small_temporary_directory / "filler").write_bytes(bytes(free))
    assert inspect_keras_file(path).values == VALUES.size + 3


def test_compressed_weights_that_do_not_fit_are_rejected_before_they_are_unpacked(small_temporary_directory):
    path = write_keras_file(small_temporary_directory / "a.keras", zipfile.ZIP_DEFLATED)
    free = shutil.disk_usage(small_temporary_directory).free
    (small_temporary_directory / "filler").write_bytes(bytes(free - (66 << 20)))
    with pytest.raises(UnavailableError) as caught:
        inspect_keras_file(path)
    assert str(caught.value).startswith(
        f"Unpacking the weights of a.keras needs about 8.0 MiB, but {small_temporary_directory} has 66.0 MiB free."
    )


def test_damaged_weights_are_rejected(tmp_path):
    path = write_keras_file(tmp_path / "a.keras")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
        inspect_keras_file(path)
