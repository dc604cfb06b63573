"""Artifacts: a directory in storage is either complete or not visible."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from topwork import __version__
from topwork.artifacts import Manifest, download_artifact, read_manifest, write_artifact
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import FileEntry, Storage, StorageSettings, describe_file
from topwork.errors import DataError, UnavailableError

CONTENT = {"a.txt": b"first", "deep/er/b.bin": bytes(range(256)) * 40, "empty": b"", "odd + näme": b"x"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_files(tmp_path / "directory", CONTENT)


def write_files(directory: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def read_files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def put_manifest(storage: Storage, files: dict[str, FileEntry], **other: object) -> None:
    content = {"format": 1, "files": {name: entry.model_dump() for name, entry in files.items()}, "facts": {}, **other}
    storage.write("set/manifest.json", json.dumps(content).encode())


def test_write_and_download_round_trip_a_directory(storage: Storage, directory: Path, tmp_path: Path) -> None:
    written = write_artifact(storage, "set", directory, {"classes": ["a", "b"], "images": 3})
    assert written == Manifest(
        files={n: FileEntry(size=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in CONTENT.items()},
        facts={"classes": ["a", "b"], "images": 3},
    )
    assert read_manifest(storage, "set") == written
    assert download_artifact(storage, "set", tmp_path / "copy") == written
    assert read_files(tmp_path / "copy") == CONTENT


def test_artifact_without_a_manifest_does_not_exist(storage: Storage, directory: Path, tmp_path: Path) -> None:
    storage.upload(directory / "a.txt", "set/a.txt")
    assert read_manifest(storage, "set") is None
    with pytest.raises(DataError) as caught:
        download_artifact(storage, "set", tmp_path / "copy")
    assert str(caught.value) == (
        f"{storage.uri}/set/manifest.json does not exist: the directory is missing or incomplete."
    )


def test_write_uploads_only_the_given_files(storage: Storage, directory: Path) -> None:
    written = write_artifact(storage, "set", directory, {}, files=["a.txt", "empty"])
    assert sorted(written.files) == ["a.txt", "empty"]
    assert sorted(item.key for item in storage.list()) == ["set/a.txt", "set/empty", "set/manifest.json"]
    assert read_manifest(storage, "set") == written


def test_write_keeps_an_existing_artifact(storage: Storage, directory: Path, tmp_path: Path) -> None:
    first = write_artifact(storage, "set", directory, {"writer": 1})
    other = write_files(tmp_path / "other", {"a.txt": b"from another writer", "more": b"!"})
    assert write_artifact(storage, "set", other, {"writer": 2}) == first
    download_artifact(storage, "set", tmp_path / "copy")
    assert read_files(tmp_path / "copy") == CONTENT


def test_concurrent_writers_produce_one_manifest(storage: Storage, directory: Path, tmp_path: Path) -> None:
    start = Barrier(2)

    def write(writer: int) -> Manifest:
        start.wait()
        return write_artifact(storage, "set", directory, {"writer": writer})

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(write, (1, 2))
    assert first == second == read_manifest(storage, "set")
    download_artifact(storage, "set", tmp_path / "copy")
    assert read_files(tmp_path / "copy") == CONTENT


def test_download_skips_files_that_match_the_manifest(
    storage: Storage, s3_settings: StorageSettings, directory: Path, tmp_path: Path
) -> None:
    manifest = write_artifact(storage, "set", directory, {})
    copy = write_files(tmp_path / "copy", {**CONTENT, "a.txt": b"FIRST"})
    metrics = Metrics()
    download_artifact(Storage(storage.uri, s3_settings, metrics), "set", copy)
    manifest_bytes = storage.size("set/manifest.json")
    assert manifest_bytes is not None
    downloaded = metrics.registry.get_sample_value("topwork_storage_bytes_total", {"direction": "download"})
    assert downloaded == manifest_bytes + manifest.files["a.txt"].size
    assert read_files(copy) == CONTENT


def test_download_fetches_only_selected_files(storage: Storage, directory: Path, tmp_path: Path) -> None:
    write_artifact(storage, "set", directory, {})
    download_artifact(storage, "set", tmp_path / "copy", select=lambda name: name.endswith(".bin"))
    assert list(read_files(tmp_path / "copy")) == ["deep/er/b.bin"]


@pytest.mark.parametrize("damage", [b"", b"firs", b"FIRST", b"first and more"])
def test_download_rejects_a_damaged_file(storage: Storage, directory: Path, tmp_path: Path, damage: bytes) -> None:
    write_artifact(storage, "set", directory, {})
    storage.write("set/a.txt", damage)
    with pytest.raises(UnavailableError, match=rf"^{storage.uri}/set/a\.txt does not match its manifest: expected 5"):
        download_artifact(storage, "set", tmp_path / "copy")
    assert "a.txt" not in read_files(tmp_path / "copy")
    assert "a.txt.part" not in read_files(tmp_path / "copy")


def test_download_reports_a_missing_file(storage: Storage, directory: Path, tmp_path: Path) -> None:
    write_artifact(storage, "set", directory, {})
    storage.delete(["set/a.txt"])
    with pytest.raises(DataError, match=rf"^{storage.uri}/set/a\.txt does not exist"):
        download_artifact(storage, "set", tmp_path / "copy")


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../out", "..", "", ".", "a\\b", "a\0b"])
def test_download_rejects_a_manifest_with_paths_outside_its_directory(
    storage: Storage, tmp_path: Path, name: str
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    put_manifest(storage, {name: describe_file(tmp_path / "source")})
    with pytest.raises(DataError) as caught:
        download_artifact(storage, "set", tmp_path / "in" / "copy")
    assert str(caught.value) == (f"{storage.uri}/set/manifest.json contains {name!r}, a path outside its directory.")
    assert list(read_files(tmp_path)) == ["source"]


def test_manifest_with_a_newer_format_requires_a_newer_topwork(storage: Storage) -> None:
    put_manifest(storage, {}, format=2)
    with pytest.raises(DataError) as caught:
        read_manifest(storage, "set")
    assert str(caught.value) == (
        f"{storage.uri}/set/manifest.json has format 2, but topwork {__version__} reads format 1. "
        "Read it with a newer topwork."
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'"x"',
        b'{"format": 1}',
        b'{"format": "1", "files": {}}',
        b'{"format": 1, "files": {"a": {"size": -1, "sha256": ""}}}',
    ],
)
def test_read_manifest_rejects_invalid_content(storage: Storage, data: bytes) -> None:
    storage.write("set/manifest.json", data)
    with pytest.raises(DataError, match=rf"^{storage.uri}/set/manifest\.json is not a topwork manifest \(.+\)\.$"):
        read_manifest(storage, "set")
