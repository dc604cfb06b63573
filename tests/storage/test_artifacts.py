"""Artifacts: a directory in storage is either complete or not visible."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import permutations
from pathlib import Path
from threading import Barrier, Semaphore, Thread
from typing import Any

import pytest

from topwork import __version__, artifacts
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


OTHER = {"a.txt": b"other", "deep/er/b.bin": bytes(9), "only here": b"!"}


class Writer:
    """A writer of an artifact that runs one step at a time: each object that it creates or uploads is a step."""

    def __init__(self, storage: Storage, directory: Path, content: dict[str, bytes]) -> None:
        self.manifest: Manifest | None = None
        self._content, self._is_done, self._is_killed = content, False, False
        self._storage, self._directory = storage.at(storage.uri), write_files(directory, content)
        self._may_run, self._has_paused = Semaphore(0), Semaphore(0)
        for name in ("create", "upload", "write"):
            setattr(self._storage, name, partial(self._step, getattr(self._storage, name)))
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()
        self._has_paused.acquire()

    def _run(self) -> None:
        try:
            with suppress(KilledError):
                self.manifest = write_artifact(self._storage, "set", self._directory, {"files": sorted(self._content)})
        finally:
            self._is_done = True
            self._has_paused.release()

    def _step(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self._has_paused.release()
        self._may_run.acquire()
        if self._is_killed:
            raise KilledError
        return function(*arguments, **options)

    def step(self) -> None:
        """Run the next step, if there is one."""
        if not self._is_done:
            self._may_run.release()
            self._has_paused.acquire()

    def finish(self) -> None:
        while not self._is_done:
            self.step()

    def kill(self) -> None:
        self._is_killed = True
        while not self._is_done:
            self._may_run.release()
            self._thread.join(0.01)


class KilledError(Exception):
    """A writer is killed."""


@pytest.fixture
def one_file_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "MAX_CONCURRENT_FILES", 1)


def check_artifact(storage: Storage, directory: Path, *contents: dict[str, bytes]) -> dict[str, bytes]:
    """Check that an artifact is complete, with the content and the facts of one of its writers; returns its files."""
    manifest = download_artifact(storage, "set", directory)
    files = read_files(directory)
    assert files in contents
    assert manifest.facts == {"files": sorted(files)}
    return files


# All orders of the first three steps of two writers, and some longer ones: the rest runs in two orders.
SCHEDULES = sorted({"".join(order) for order in permutations("AAABBB")} | {"AB" * 6, "AABB" * 4, "ABBB" * 3})


@pytest.mark.usefixtures("one_file_at_a_time")
@pytest.mark.parametrize("first_to_finish", ["A", "B"])
def test_files_of_concurrent_writers_never_mix(storage: Storage, tmp_path: Path, first_to_finish: str) -> None:
    for number, schedule in enumerate(SCHEDULES[first_to_finish == "B" :: 2]):
        inner, root = storage.at(storage.uri_of(str(number))), tmp_path / str(number)
        writers = {"A": Writer(inner, root / "A", CONTENT), "B": Writer(inner, root / "B", OTHER)}
        for name in schedule:
            writers[name].step()
        for name in sorted(writers, reverse=first_to_finish == "B"):
            writers[name].finish()
        assert writers["A"].manifest == writers["B"].manifest == read_manifest(inner, "set"), schedule
        files = check_artifact(inner, root / "copy", CONTENT, OTHER)
        # Without topwork: all files of the winner have their plain names.
        plain = {name: inner.read(f"set/{name}") for name in files}
        assert plain == files, schedule


@pytest.mark.usefixtures("one_file_at_a_time")
def test_artifact_is_complete_after_a_writer_was_killed_at_any_step(storage: Storage, tmp_path: Path) -> None:
    for step in range(8):
        inner, root = storage.at(storage.uri_of(str(step))), tmp_path / str(step)
        killed, other = Writer(inner, root / "A", CONTENT), Writer(inner, root / "B", OTHER)
        other.step()
        for _ in range(step):
            killed.step()
        killed.kill()
        other.kill()
        third = write_files(root / "C", {**OTHER, "a.txt": b"third"})
        manifest = write_artifact(inner, "set", third, {"files": sorted(OTHER)})
        check_artifact(inner, root / "copy", CONTENT, OTHER, read_files(third))
        assert read_manifest(inner, "set") == manifest


def test_killed_writer_resumes_without_a_second_copy(storage: Storage, directory: Path, tmp_path: Path) -> None:
    storage.upload(directory / "a.txt", "set/a.txt")
    manifest = write_artifact(storage, "set", directory, {})
    assert manifest.directory == ""
    assert len(list(storage.list())) == len(CONTENT) + 1


def test_file_that_is_deleted_before_the_manifest_exists_is_uploaded_again(
    storage: Storage, directory: Path, tmp_path: Path
) -> None:
    class Collected(Storage):
        def write(self, key: str, data: bytes, **options: Any) -> bool:
            self.delete(["set/a.txt"])
            return super().write(key, data, **options)

    collected = object.__new__(Collected)
    collected.__dict__.update(storage.__dict__)
    write_artifact(collected, "set", directory, {})
    download_artifact(storage, "set", tmp_path / "copy")
    assert read_files(tmp_path / "copy") == CONTENT


def test_manifest_of_an_earlier_version_is_read(storage: Storage, directory: Path, tmp_path: Path) -> None:
    for name in CONTENT:
        storage._client.upload_file(str(directory / name), **storage.target(f"set/{name}"))
    put_manifest(storage, {name: describe_file(directory / name) for name in CONTENT}, unknown={"key": 1})
    assert download_artifact(storage, "set", tmp_path / "copy").directory == ""
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
