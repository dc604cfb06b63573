"""Objects in a real S3 server: there and back, whole, counted and claimed once."""

import hashlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import FileEntry, Storage, StorageSettings, StoredObject, entry_of
from topwork.errors import DataError, SettingError, UnavailableError

MEBIBYTE = 1 << 20
ODD_KEYS = ["plain", "with space/a b.png", "plus+and%20percent", "grün/日本語.jpg", "quote'and&amp;<x>", "dots/..x/…"]


@pytest.fixture
def in_parts(storage: Storage, s3_settings: StorageSettings) -> Storage:
    """The same place, with files of more than 5 MiB sent in parts."""
    small = StorageSettings(**{**s3_settings.__dict__, "part_bytes": 5 * MEBIBYTE})
    return Storage(storage.uri, small)


def large_file(path: Path, size: int) -> Path:
    path.write_bytes(random.Random(0).randbytes(size))
    return path


def test_a_small_object_is_read_as_it_was_written(storage: Storage) -> None:
    assert storage.read("a/b.json") is None
    assert storage.size("a/b.json") is None
    assert storage.write("a/b.json", b'{"x": 1}', content_type="application/json") is True
    assert storage.read("a/b.json") == b'{"x": 1}'
    assert storage.size("a/b.json") == 8


def test_write_replaces_what_was_there(storage: Storage) -> None:
    storage.write("key", b"first")
    assert storage.write("key", b"second") is True
    assert storage.read("key") == b"second"


def test_write_only_if_absent_leaves_what_was_there(storage: Storage) -> None:
    assert storage.write("key", b"first", only_if_absent=True) is True
    assert storage.write("key", b"second", only_if_absent=True) is False
    # The same bytes too: who finds its claim made was not the one that made it.
    assert storage.write("key", b"first", only_if_absent=True) is False
    assert storage.read("key") == b"first"


def test_of_two_writers_at_once_exactly_one_wins(storage: Storage) -> None:
    for round_number in range(2):
        start = Barrier(4)

        def claim(writer: int, key: str = f"claim-{round_number}", start: Barrier = start) -> bool:
            start.wait()
            return storage.write(key, str(writer).encode(), only_if_absent=True)

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(claim, range(4)))
        assert sorted(won) == [False, False, False, True]
        assert storage.read(f"claim-{round_number}") == str(won.index(True)).encode()


@pytest.mark.parametrize("key", ODD_KEYS)
def test_keys_with_odd_characters_are_kept(storage: Storage, tmp_path: Path, key: str) -> None:
    storage.write(key, b"odd")
    assert [found.key for found in storage.list()] == [key]
    assert storage.download(key, tmp_path / "file").size == 3
    storage.delete([key])
    assert list(storage.list()) == []


def test_list_tells_key_size_and_etag_below_a_prefix(storage: Storage) -> None:
    for key in ("a/1", "a/2", "ab", "b"):
        storage.write(key, key.encode())
    etags = {key: hashlib.md5(key.encode()).hexdigest() for key in ("a/1", "a/2", "ab", "b")}
    assert sorted(storage.list("a/"), key=lambda found: found.key) == [
        StoredObject("a/1", 3, etags["a/1"]),
        StoredObject("a/2", 3, etags["a/2"]),
    ]
    assert sorted(found.key for found in storage.list()) == ["a/1", "a/2", "ab", "b"]


def test_list_and_delete_go_past_one_thousand_objects(storage: Storage) -> None:
    keys = [f"many/{index:04}" for index in range(1001)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: storage.write(key, b"x"), keys))
    assert sorted(found.key for found in storage.list("many/")) == keys
    storage.delete([*keys, "many/never-there"])
    assert list(storage.list()) == []


def test_storage_at_another_uri_sees_that_place_only(storage: Storage) -> None:
    storage.write("inner/key", b"x")
    inner = storage.at(storage.uri_of("inner/"))
    assert inner.uri == f"{storage.uri}/inner"
    assert inner.uri_of("key") == f"{storage.uri}/inner/key"
    assert [found.key for found in inner.list()] == ["key"]
    assert storage.read("key") is None


@pytest.mark.parametrize("size", [0, 1, 5 * MEBIBYTE, 12 * MEBIBYTE + 7])
def test_a_file_of_any_size_comes_back_as_it_was(in_parts: Storage, tmp_path: Path, size: int) -> None:
    source = large_file(tmp_path / "source", size)
    entry = in_parts.upload(source, "file")
    assert entry == FileEntry(size=size, sha256=hashlib.sha256(source.read_bytes()).hexdigest())
    # An ETag with a dash is that of an object sent in parts.
    assert ["-" in found.etag for found in in_parts.list()] == [size >= 5 * MEBIBYTE]
    assert in_parts.download("file", tmp_path / "deep" / "er" / "copy", entry) == entry
    assert entry_of(tmp_path / "deep" / "er" / "copy") == entry


def test_download_replaces_a_file_and_leaves_no_part_of_it(storage: Storage, tmp_path: Path) -> None:
    storage.write("key", b"new")
    (tmp_path / "file").write_bytes(b"older and longer")
    (tmp_path / "file.part").write_bytes(b"left by a killed process, and longer too")
    storage.download("key", tmp_path / "file")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


def test_download_of_damaged_bytes_is_refused_and_leaves_the_old_file(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    storage.write("key", b"damaged!")
    good = FileEntry(size=8, sha256=hashlib.sha256(b"complete").hexdigest())
    with pytest.raises(UnavailableError) as caught:
        storage.download("key", tmp_path / "file", good)
    got = hashlib.sha256(b"damaged!").hexdigest()
    assert str(caught.value) == (
        f"{storage.uri}/key is not what its manifest says: expected 8 bytes with SHA-256 {good.sha256}, got 8 bytes "
        f"with {got}. It was damaged or replaced: try again, and delete it with its manifest if this stays so."
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_download_of_a_missing_object_names_it(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{storage.uri}/none does not exist at http://127\.0\.0\.1:\d+\.$"):
        storage.download("none", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_move_are_counted(storage: Storage, s3_settings: StorageSettings, tmp_path: Path) -> None:
    metrics = Metrics()
    counted = Storage(storage.uri, s3_settings, metrics)
    source = large_file(tmp_path / "source", 3 * MEBIBYTE)
    entry = counted.upload(source, "file")
    counted.write("small", b"12345")
    counted.download("file", tmp_path / "copy", entry)
    assert counted.read("small") == b"12345"

    def moved(direction: str) -> float | None:
        return metrics.registry.get_sample_value("topwork_storage_bytes_total", {"direction": direction})

    assert (moved("upload"), moved("download")) == (3 * MEBIBYTE + 5, 3 * MEBIBYTE + 5)
    assert metrics.registry.get_sample_value("topwork_storage_retries_total") == 0


def test_unfinished_uploads_are_given_back_below_the_prefix_and_of_that_age_only(storage: Storage) -> None:
    base = storage.uri.removeprefix(f"s3://{storage._bucket}/")
    for key in ("mine/1", "mine/2", "other"):
        storage._client.create_multipart_upload(Bucket=storage._bucket, Key=f"{base}/{key}")
    assert storage.uploads.abort_unfinished("mine/", older_than_seconds=3600) == 0
    time.sleep(1.1)  # The server tells whole seconds.
    assert storage.uploads.abort_unfinished("mine/", older_than_seconds=0) == 2
    assert storage.uploads.abort_unfinished(older_than_seconds=0) == 1
    assert storage.uploads.abort_unfinished(older_than_seconds=0) == 0


@pytest.mark.parametrize("uri", ["", "bucket/prefix", "s3://", "s3:///prefix", "https://host/bucket", "s3://b?x=1"])
def test_what_is_no_storage_uri_is_refused(uri: str) -> None:
    with pytest.raises(SettingError) as caught:
        Storage(uri)
    assert str(caught.value) == f"{uri!r} is not a storage URI: expected s3://bucket or s3://bucket/prefix."


def test_the_secret_is_not_shown(s3_settings: StorageSettings) -> None:
    assert s3_settings.secret_key
    assert s3_settings.secret_key not in repr(s3_settings)
