"""Storage on a real S3 server: reads, writes, listings, conditional writes, uploads and downloads."""

import hashlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import FileEntry, Storage, StorageSettings, StoredObject, describe_file
from topwork.errors import DataError, SettingError, UnavailableError

MEBIBYTE = 1 << 20
SPECIAL_KEYS = [
    "plain",
    "with space/a b.png",
    "plus+and%20percent",
    "grün/日本語.jpg",
    "quote'and&amp;<x>",
    "dots/..x/…",
]


@pytest.fixture
def multipart_storage(storage: Storage, s3_settings: StorageSettings) -> Storage:
    """Storage that uploads files above 5 MiB in parts."""
    settings = StorageSettings(**{**s3_settings.__dict__, "part_bytes": 5 * MEBIBYTE})
    return Storage(storage.uri, settings)


def write_random_file(path: Path, size: int) -> Path:
    path.write_bytes(random.Random(0).randbytes(size))
    return path


def test_read_returns_the_written_bytes(storage: Storage) -> None:
    assert storage.read("a/b.json") is None
    assert storage.size("a/b.json") is None
    assert storage.write("a/b.json", b'{"x": 1}', content_type="application/json") is True
    assert storage.read("a/b.json") == b'{"x": 1}'
    assert storage.size("a/b.json") == 8


def test_write_replaces_an_existing_object(storage: Storage) -> None:
    storage.write("key", b"first")
    assert storage.write("key", b"second") is True
    assert storage.read("key") == b"second"


def test_write_if_absent_leaves_an_existing_object_unchanged(storage: Storage) -> None:
    assert storage.write("key", b"first", only_if_absent=True) is True
    assert storage.write("key", b"second", only_if_absent=True) is False
    # Also with identical bytes: without a retry, the object belongs to another writer.
    assert storage.write("key", b"first", only_if_absent=True) is False
    assert storage.read("key") == b"first"


def test_exactly_one_concurrent_conditional_write_succeeds(storage: Storage) -> None:
    for round_number in range(2):
        start = Barrier(4)

        def write(writer: int, key: str = f"claim-{round_number}", start: Barrier = start) -> bool:
            start.wait()
            return storage.write(key, str(writer).encode(), only_if_absent=True)

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(write, range(4)))
        assert sorted(results) == [False, False, False, True]
        assert storage.read(f"claim-{round_number}") == str(results.index(True)).encode()


@pytest.mark.parametrize("size", [0, 5, 12 * MEBIBYTE + 7])
def test_create_never_replaces_an_object(multipart_storage: Storage, tmp_path: Path, size: int) -> None:
    first, second = write_random_file(tmp_path / "first", size), tmp_path / "second"
    second.write_bytes(first.read_bytes()[:-1] + b"!")
    entry = describe_file(first)
    assert multipart_storage.create(first, "file", entry) is True
    # The same content again, as after a restart.
    assert multipart_storage.create(first, "file", entry) is True
    assert multipart_storage.create(second, "file", describe_file(second)) is False
    assert multipart_storage.download("file", tmp_path / "copy", entry) == entry


def test_create_recognizes_an_uploaded_file(multipart_storage: Storage, tmp_path: Path) -> None:
    entry = multipart_storage.upload(write_random_file(tmp_path / "file", 6 * MEBIBYTE), "file")
    assert multipart_storage.create(tmp_path / "file", "file", entry) is True


@pytest.mark.parametrize("size", [10, 6 * MEBIBYTE])
def test_exactly_one_content_wins_among_concurrent_creations(
    multipart_storage: Storage, tmp_path: Path, size: int
) -> None:
    for writer in range(4):
        (tmp_path / str(writer)).write_bytes(bytes([writer // 2]) * size)
    for round_number in range(3):
        start = Barrier(4)

        def create(writer: int, key: str = f"file-{round_number}", start: Barrier = start) -> bool:
            path = tmp_path / str(writer)
            entry = describe_file(path)
            start.wait()
            return multipart_storage.create(path, key, entry)

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(create, range(4)))
        # Two pairs of writers have the same content.
        assert results in ([True, True, False, False], [False, False, True, True])
        winner = tmp_path / str(results.index(True))
        assert multipart_storage.download(f"file-{round_number}", tmp_path / "copy") == describe_file(winner)


@pytest.mark.parametrize("key", SPECIAL_KEYS)
def test_keys_with_special_characters_round_trip(storage: Storage, tmp_path: Path, key: str) -> None:
    storage.write(key, b"abc")
    assert [item.key for item in storage.list()] == [key]
    assert storage.download(key, tmp_path / "file").size == 3
    storage.delete([key])
    assert list(storage.list()) == []


def test_list_returns_key_size_and_etag_below_a_prefix(storage: Storage) -> None:
    for key in ("a/1", "a/2", "ab", "b"):
        storage.write(key, key.encode())
    etags = {key: hashlib.md5(key.encode()).hexdigest() for key in ("a/1", "a/2", "ab", "b")}
    assert sorted(storage.list("a/"), key=lambda item: item.key) == [
        StoredObject("a/1", 3, etags["a/1"]),
        StoredObject("a/2", 3, etags["a/2"]),
    ]
    assert sorted(item.key for item in storage.list()) == ["a/1", "a/2", "ab", "b"]


def test_list_and_delete_handle_more_than_one_thousand_objects(storage: Storage) -> None:
    keys = [f"many/{index:04}" for index in range(1001)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: storage.write(key, b"x"), keys))
    assert sorted(item.key for item in storage.list("many/")) == keys
    storage.delete([*keys, "many/missing"])
    assert list(storage.list()) == []


def test_at_returns_storage_limited_to_another_uri(storage: Storage) -> None:
    storage.write("inner/key", b"x")
    inner = storage.at(storage.uri_of("inner/"))
    assert inner.uri == f"{storage.uri}/inner"
    assert inner.uri_of("key") == f"{storage.uri}/inner/key"
    assert [item.key for item in inner.list()] == ["key"]
    assert storage.read("key") is None


@pytest.mark.parametrize("size", [0, 1, 5 * MEBIBYTE, 12 * MEBIBYTE + 7])
def test_upload_and_download_round_trip_a_file_of_any_size(
    multipart_storage: Storage, tmp_path: Path, size: int
) -> None:
    source = write_random_file(tmp_path / "source", size)
    entry = multipart_storage.upload(source, "file")
    assert entry == FileEntry(size=size, sha256=hashlib.sha256(source.read_bytes()).hexdigest())
    # The ETag of a multipart upload contains a hyphen.
    assert ["-" in item.etag for item in multipart_storage.list()] == [size >= 5 * MEBIBYTE]
    assert multipart_storage.download("file", tmp_path / "deep" / "er" / "copy", entry) == entry
    assert describe_file(tmp_path / "deep" / "er" / "copy") == entry


def test_download_replaces_a_file_and_leaves_no_partial_file(storage: Storage, tmp_path: Path) -> None:
    storage.write("key", b"new")
    (tmp_path / "file").write_bytes(b"older and longer")
    (tmp_path / "file.part").write_bytes(b"left by a killed process, and longer too")
    storage.download("key", tmp_path / "file")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


def test_download_rejects_damaged_content_and_keeps_the_existing_file(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    storage.write("key", b"damaged!")
    expected = FileEntry(size=8, sha256=hashlib.sha256(b"complete").hexdigest())
    with pytest.raises(UnavailableError) as caught:
        storage.download("key", tmp_path / "file", expected)
    actual = hashlib.sha256(b"damaged!").hexdigest()
    assert str(caught.value) == (
        f"{storage.uri}/key does not match its manifest: expected 8 bytes with SHA-256 {expected.sha256}, got 8 bytes "
        f"with {actual}. The object was damaged or replaced: try again, and if the error persists, delete the object "
        "and its manifest."
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_download_of_a_missing_object_reports_its_uri(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{storage.uri}/none does not exist at http://127\.0\.0\.1:\d+\.$"):
        storage.download("none", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_transferred_bytes_are_counted(storage: Storage, s3_settings: StorageSettings, tmp_path: Path) -> None:
    metrics = Metrics()
    counted = Storage(storage.uri, s3_settings, metrics)
    source = write_random_file(tmp_path / "source", 3 * MEBIBYTE)
    entry = counted.upload(source, "file")
    counted.write("small", b"12345")
    counted.download("file", tmp_path / "copy", entry)
    assert counted.read("small") == b"12345"

    def transferred(direction: str) -> float | None:
        return metrics.registry.get_sample_value("topwork_storage_bytes_total", {"direction": direction})

    assert (transferred("upload"), transferred("download")) == (3 * MEBIBYTE + 5, 3 * MEBIBYTE + 5)
    assert metrics.registry.get_sample_value("topwork_storage_retries_total") == 0


def test_abort_incomplete_honors_prefix_and_age(storage: Storage) -> None:
    base = storage.uri.removeprefix(f"s3://{storage._bucket}/")
    for key in ("mine/1", "mine/2", "other"):
        storage._client.create_multipart_upload(Bucket=storage._bucket, Key=f"{base}/{key}")
    assert storage.multipart_uploads.abort_incomplete("mine/", older_than_seconds=3600) == 0
    time.sleep(1.1)  # The server reports whole seconds.
    assert storage.multipart_uploads.abort_incomplete("mine/", older_than_seconds=0) == 2
    assert storage.multipart_uploads.abort_incomplete(older_than_seconds=0) == 1
    assert storage.multipart_uploads.abort_incomplete(older_than_seconds=0) == 0


@pytest.mark.parametrize("uri", ["", "bucket/prefix", "s3://", "s3:///prefix", "https://host/bucket", "s3://b?x=1"])
def test_storage_rejects_an_invalid_uri(uri: str) -> None:
    with pytest.raises(SettingError) as caught:
        Storage(uri)
    assert str(caught.value) == f"{uri!r} is not a storage URI: expected s3://bucket or s3://bucket/prefix."


def test_settings_do_not_show_the_secret_key(s3_settings: StorageSettings) -> None:
    assert s3_settings.secret_key
    assert s3_settings.secret_key not in repr(s3_settings)
