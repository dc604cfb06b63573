"""A folder in storage is whole or not there."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from topwork import __version__
from topwork.artifacts import Manifest, fetch_whole, read_manifest, write_whole
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import FileEntry, Storage, StorageSettings, entry_of
from topwork.errors import DataError, UnavailableError

CONTENT = {"a.txt": b"first", "deep/er/b.bin": bytes(range(256)) * 40, "empty": b"", "odd + näme": b"x"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path / "folder", CONTENT)


def filled(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_manifest(storage: Storage, files: dict[str, FileEntry], **other: object) -> None:
    content = {"format": 1, "files": {name: entry.model_dump() for name, entry in files.items()}, "facts": {}, **other}
    storage.write("set/manifest.json", json.dumps(content).encode())


def test_a_folder_comes_back_as_it_was_written(storage: Storage, folder: Path, tmp_path: Path) -> None:
    written = write_whole(storage, "set", folder, {"classes": ["a", "b"], "images": 3})
    assert written == Manifest(
        files={n: FileEntry(size=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in CONTENT.items()},
        facts={"classes": ["a", "b"], "images": 3},
    )
    assert read_manifest(storage, "set") == written
    assert fetch_whole(storage, "set", tmp_path / "copy") == written
    assert read_all(tmp_path / "copy") == CONTENT


def test_a_folder_is_not_there_before_its_manifest(storage: Storage, folder: Path, tmp_path: Path) -> None:
    storage.upload(folder / "a.txt", "set/a.txt")
    assert read_manifest(storage, "set") is None
    with pytest.raises(DataError) as caught:
        fetch_whole(storage, "set", tmp_path / "copy")
    assert str(caught.value) == (
        f"{storage.uri}/set/manifest.json does not exist: the folder is not there, or not whole yet."
    )


def test_the_chosen_files_alone_are_written_under_a_chosen_name(storage: Storage, folder: Path) -> None:
    written = write_whole(storage, "set", folder, {}, name="done.json", files=["a.txt", "empty"])
    assert sorted(written.files) == ["a.txt", "empty"]
    assert sorted(found.key for found in storage.list()) == ["set/a.txt", "set/done.json", "set/empty"]
    assert read_manifest(storage, "set", name="done.json") == written


def test_the_manifest_that_stands_wins_and_its_files_stay(storage: Storage, folder: Path, tmp_path: Path) -> None:
    first = write_whole(storage, "set", folder, {"writer": 1})
    other = filled(tmp_path / "other", {"a.txt": b"of another writer", "more": b"!"})
    assert write_whole(storage, "set", other, {"writer": 2}) == first
    fetch_whole(storage, "set", tmp_path / "copy")
    assert read_all(tmp_path / "copy") == CONTENT


def test_two_writers_at_once_end_with_one_manifest(storage: Storage, folder: Path, tmp_path: Path) -> None:
    start = Barrier(2)

    def write(writer: int) -> Manifest:
        start.wait()
        return write_whole(storage, "set", folder, {"writer": writer})

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(write, (1, 2))
    assert one == two == read_manifest(storage, "set")
    fetch_whole(storage, "set", tmp_path / "copy")
    assert read_all(tmp_path / "copy") == CONTENT


def test_what_is_right_on_disk_is_not_fetched_again(
    storage: Storage, s3_settings: StorageSettings, folder: Path, tmp_path: Path
) -> None:
    manifest = write_whole(storage, "set", folder, {})
    copy = filled(tmp_path / "copy", {**CONTENT, "a.txt": b"FIRST"})
    metrics = Metrics()
    fetch_whole(Storage(storage.uri, s3_settings, metrics), "set", copy)
    manifest_bytes = storage.size("set/manifest.json")
    assert manifest_bytes is not None
    moved = metrics.registry.get_sample_value("topwork_storage_bytes_total", {"direction": "download"})
    assert moved == manifest_bytes + manifest.files["a.txt"].size
    assert read_all(copy) == CONTENT


def test_only_what_is_chosen_is_fetched(storage: Storage, folder: Path, tmp_path: Path) -> None:
    write_whole(storage, "set", folder, {})
    fetch_whole(storage, "set", tmp_path / "copy", only=lambda name: name.endswith(".bin"))
    assert list(read_all(tmp_path / "copy")) == ["deep/er/b.bin"]


@pytest.mark.parametrize("damage", [b"", b"firs", b"FIRST", b"first and more"])
def test_a_stored_file_that_was_damaged_is_refused(
    storage: Storage, folder: Path, tmp_path: Path, damage: bytes
) -> None:
    write_whole(storage, "set", folder, {})
    storage.write("set/a.txt", damage)
    with pytest.raises(UnavailableError, match=rf"^{storage.uri}/set/a\.txt is not what its manifest says: expected 5"):
        fetch_whole(storage, "set", tmp_path / "copy")
    assert "a.txt" not in read_all(tmp_path / "copy")
    assert "a.txt.part" not in read_all(tmp_path / "copy")


def test_a_stored_file_that_is_gone_is_named(storage: Storage, folder: Path, tmp_path: Path) -> None:
    write_whole(storage, "set", folder, {})
    storage.delete(["set/a.txt"])
    with pytest.raises(DataError, match=rf"^{storage.uri}/set/a\.txt does not exist"):
        fetch_whole(storage, "set", tmp_path / "copy")


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../out", "..", "", ".", "a\\b", "a\0b"])
def test_a_manifest_that_points_out_of_its_folder_is_refused(storage: Storage, tmp_path: Path, name: str) -> None:
    (tmp_path / "source").write_bytes(b"x")
    put_manifest(storage, {name: entry_of(tmp_path / "source")})
    with pytest.raises(DataError) as caught:
        fetch_whole(storage, "set", tmp_path / "in" / "copy")
    assert str(caught.value) == (f"{storage.uri}/set/manifest.json names {name!r}, a path outside of its folder.")
    assert list(read_all(tmp_path)) == ["source"]


def test_a_manifest_of_a_newer_format_asks_for_a_newer_topwork(storage: Storage) -> None:
    put_manifest(storage, {}, format=2)
    with pytest.raises(DataError) as caught:
        read_manifest(storage, "set")
    assert str(caught.value) == (
        f"{storage.uri}/set/manifest.json has format 2; topwork {__version__} reads format 1. "
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
def test_what_is_no_manifest_is_refused(storage: Storage, data: bytes) -> None:
    storage.write("set/manifest.json", data)
    with pytest.raises(DataError, match=rf"^{storage.uri}/set/manifest\.json is not a manifest of topwork \(.+\)\.$"):
        read_manifest(storage, "set")
