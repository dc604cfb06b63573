"""Directories, archives and tables as data sources: images, classes, digests and rejected input."""

import functools
import hashlib
import http.server
import io
import json
import re
import tarfile
import threading
import zipfile
from types import SimpleNamespace

import pytest

from topwork.clients.prometheus.metrics import Metrics
from topwork.data.images.image_validation import Rejection
from topwork.data.sources import download, open_source
from topwork.errors import DataError, UnavailableError
from topwork.spec.dataset import DatasetSource

CONTENT = {"pets/cat/1.jpg": b"cat one", "pets/cat/more/2.jpg": b"cat two", "pets/dog/1.png": b"dog one"}
IGNORED_FILES = {
    "pets/cat/.hidden": b"h",
    "pets/dog/Thumbs.db": b"t",
    "pets/README.txt": b"r",
    "__MACOSX/pets/cat/1.jpg": b"m",
}


@pytest.fixture
def workspace(tmp_path):
    """A workspace without storage."""
    return SimpleNamespace(scratch=tmp_path / "scratch", storage=None, metrics=Metrics())


def _open(workspace, **source):
    return open_source(DatasetSource.model_validate(source), workspace)


def _read(source, split="train"):
    """Read a source as (name, class, bytes or rejection reason)."""
    results = []
    for image in source.images(split):
        try:
            results.append((image.name, image.label, image.read()))
        except Rejection as rejection:
            results.append((image.name, image.label, rejection.reason))
    return results


def _write_files(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _write_archive(path, kind, files):
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return
    with tarfile.open(path, f"w:{kind}") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


# Directories


def test_folder_reads_images_at_any_depth_and_ignores_other_files(workspace, tmp_path):
    _write_files(tmp_path, CONTENT | IGNORED_FILES)
    source = _open(workspace, folder={"uri": str(tmp_path / "pets")})
    assert source.name == "pets"
    assert source.class_names() == ("cat", "dog")
    assert source.splits() == {"train": 3}
    assert _read(source) == [
        ("cat/1.jpg", "cat", b"cat one"),
        ("cat/more/2.jpg", "cat", b"cat two"),
        ("dog/1.png", "dog", b"dog one"),
    ]


def test_folder_digest_changes_only_with_the_images(workspace, tmp_path):
    _write_files(tmp_path, CONTENT)

    def digest():
        return _open(workspace, folder={"uri": f"{tmp_path}/pets/"}).digest()

    before = digest()
    assert digest() == before
    (tmp_path / "pets/README").write_text("not an image")
    assert digest() == before
    (tmp_path / "pets/dog/2.png").write_bytes(b"dog two")
    assert digest() != before


def test_folder_follows_links_without_loops_and_rejects_broken_links(workspace, tmp_path):
    _write_files(tmp_path, CONTENT)
    (tmp_path / "pets/cat/loop").symlink_to(tmp_path / "pets")
    (tmp_path / "pets/dog/broken.jpg").symlink_to(tmp_path / "gone.jpg")
    assert [entry[::2] for entry in _read(_open(workspace, folder={"uri": str(tmp_path / "pets")}))] == [
        ("cat/1.jpg", b"cat one"),
        ("cat/more/2.jpg", b"cat two"),
        ("dog/1.png", b"dog one"),
        ("dog/broken.jpg", "missing"),
    ]


def test_folder_that_is_missing_or_has_no_class_directories_is_rejected(workspace, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        _open(workspace, folder={"uri": str(tmp_path / "nothing")}).digest()
    (tmp_path / "1.jpg").write_bytes(b"loose")
    with pytest.raises(DataError, match=r"directly contains image files, such as 1\.jpg\. .* set .*folder\.uri to the"):
        _open(workspace, folder={"uri": str(tmp_path)}).digest()
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"contains no image in a class directory\. Expected <class>/<image>"):
        _open(workspace, folder={"uri": str(tmp_path)}).digest()


# Archives


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("zip", "pets.zip"),
        ("", "pets.tar"),
        ("gz", "pets.tgz"),
        ("bz2", "pets.tar.bz2"),
        ("xz", "pets.txz"),
        ("zip", "pets.tar.gz"),
    ],
)
def test_archive_format_is_detected_from_the_content(workspace, tmp_path, kind, name):
    _write_archive(tmp_path / name, kind, CONTENT | IGNORED_FILES)
    source = _open(workspace, archive={"uri": str(tmp_path / name), "root": "pets/"})
    assert source.class_names() == ("cat", "dog")
    assert source.splits() == {"train": 3}
    assert _read(source) == [(path, path.split("/")[1], data) for path, data in CONTENT.items()]
    assert source.name == "pets"


# Hostile archives are tested in tests/hostile/test_archives.py.


@pytest.mark.parametrize("kind", ["zip", "", "gz", "bz2", "xz"])
def test_truncated_archive_is_rejected(workspace, tmp_path, kind):
    path = tmp_path / "pets.tar"
    noise = {f"pets/cat/{index}.jpg": hashlib.sha512(bytes([index])).digest() * 20 for index in range(50)}
    _write_archive(path, kind, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"is damaged or truncated|is not a readable archive"):
        _read(_open(workspace, archive={"uri": str(path), "root": "pets"}))


def test_damaged_zip_member_is_rejected_and_the_others_are_read(workspace, tmp_path):
    path = tmp_path / "pets.zip"
    _write_archive(path, "zip", CONTENT)
    path.write_bytes(path.read_bytes().replace(b"cat two", b"cat 2wo"))
    assert [entry[2] for entry in _read(_open(workspace, archive={"uri": str(path), "root": "pets"}))] == [
        b"cat one",
        "undecodable",
        b"dog one",
    ]


def test_file_that_is_not_an_archive_is_rejected(workspace, tmp_path):
    (tmp_path / "pets.zip").write_bytes(b"<html>Not Found</html>" * 100)
    expected = r"is not a readable archive\. It is an HTML page, .* Expected zip, tar, tar\.gz"
    with pytest.raises(DataError, match=expected):
        _open(workspace, archive={"uri": str(tmp_path / "pets.zip")}).class_names()


def test_wrong_archive_root_is_rejected_with_the_directories_in_the_archive(workspace, tmp_path):
    _write_archive(tmp_path / "pets.zip", "zip", CONTENT)
    with pytest.raises(
        DataError, match=re.escape("below PetImages. Directories with files: pets/cat, pets/cat/more, pets/dog")
    ):
        _open(workspace, archive={"uri": str(tmp_path / "pets.zip"), "root": "PetImages"}).class_names()


def test_wrong_sha256_is_rejected_and_the_local_file_is_kept(workspace, tmp_path):
    _write_archive(tmp_path / "pets.zip", "zip", CONTENT)
    with pytest.raises(DataError, match=r"has the SHA-256 [0-9a-f]{64}, but .*sha256 is 0{64}"):
        _open(workspace, archive={"uri": str(tmp_path / "pets.zip"), "sha256": "0" * 64}).class_names()
    assert (tmp_path / "pets.zip").exists()


# Archives over HTTP


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
        elif self.server.broken_connections:
            self.server.broken_connections -= 1
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"PK")
            self.close_connection = True
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.01)
    _write_archive(tmp_path / "pets.zip", "zip", CONTENT)
    (tmp_path / "scratch").mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Handler, directory=str(tmp_path))
    ) as http_server:
        http_server.failures = http_server.broken_connections = 0
        http_server.requests = []
        http_server.address = f"127.0.0.1:{http_server.server_port}"
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield http_server
        http_server.shutdown()
        thread.join()


def test_archive_download_is_retried_after_server_errors(workspace, server):
    server.failures, server.broken_connections = 2, 2
    source = _open(workspace, archive={"uri": f"http://{server.address}/pets.zip", "root": "pets"})
    assert [entry[2] for entry in _read(source)] == list(CONTENT.values())
    assert len(server.requests) == 5


def test_archive_digest_changes_with_the_file_and_downloads_nothing(workspace, server, tmp_path):
    source = _open(workspace, archive={"uri": f"http://{server.address}/pets.zip", "root": "pets"})
    before = source.digest()
    _write_archive(tmp_path / "pets.zip", "zip", CONTENT | {"pets/dog/2.png": b"dog two"})
    assert source.digest() != before
    assert server.requests == []


def test_archive_on_a_failing_server_is_unavailable(workspace, server):
    server.failures = 99
    with pytest.raises(UnavailableError, match=r"could not be downloaded in 5 attempts: the server responded with 503"):
        _open(workspace, archive={"uri": f"http://{server.address}/pets.zip"}).class_names()


def test_archive_on_an_unreachable_host_is_unavailable(workspace, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UnavailableError, match="Connection refused"):
        _open(workspace, archive={"uri": f"http://{server.address}/pets.zip"}).digest()


def test_missing_archive_url_is_rejected_without_retries(workspace, server):
    with pytest.raises(DataError, match=r"/other\.zip cannot be downloaded: the server responded with 404"):
        _open(workspace, archive={"uri": f"http://{server.address}/other.zip"}).class_names()
    assert len(server.requests) == 1


def test_url_query_is_sent_but_never_shown(workspace, server):
    source = _open(workspace, archive={"uri": f"http://{server.address}/pets.zip?id=hidden", "root": "pets"})
    assert source.class_names() == ("cat", "dog")
    assert server.requests == [("GET", "/pets.zip?id=hidden")]
    assert source.description()["archive"]["uri"] == f"http://{server.address}/pets.zip"
    with pytest.raises(DataError) as error:
        _open(workspace, archive={"uri": f"http://{server.address}/other.zip?id=hidden"}).class_names()
    assert "hidden" not in str(error.value)


# Tables


def test_csv_paths_are_relative_to_the_table(workspace, tmp_path):
    _write_files(tmp_path, {"set/images/1.jpg": b"one", "set/images/2.jpg": b"two", "three.jpg": b"three"})
    rows = [
        "file,kind",
        "images/1.jpg,cat",
        "images/2.jpg, dog",
        "../three.jpg,cat",
        "images/9.jpg,dog",
        "images/1.jpg,",
    ]
    (tmp_path / "set/labels.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    source = _open(workspace, table={"uri": str(tmp_path / "set/labels.csv"), "image": "file", "label": "kind"})
    assert source.name == "labels"
    assert source.class_names() == ("cat", "dog")
    assert source.splits() == {"train": 5}
    assert _read(source) == [
        ("images/1.jpg", "cat", b"one"),
        ("images/2.jpg", "dog", b"two"),
        ("../three.jpg", "cat", b"three"),
        ("images/9.jpg", "dog", "missing"),
        ("images/1.jpg", None, b"one"),
    ]


def test_json_lines_accept_text_and_number_classes(workspace, tmp_path):
    _write_files(tmp_path, {"1.jpg": b"one", "2.jpg": b"two"})
    rows = [{"image": "1.jpg", "label": 3, "other": []}, {"image": str(tmp_path / "2.jpg"), "label": "4"}]
    (tmp_path / "labels.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    source = _open(workspace, table={"uri": str(tmp_path / "labels.jsonl")})
    assert source.class_names() == ("3", "4")
    assert [entry[1:] for entry in _read(source)] == [("3", b"one"), ("4", b"two")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file,label\n1.jpg,cat\n", "a.csv, line 2: no column image. The columns are file, label."),
        ("a.csv", "", "a.csv has no rows."),
        ("a.csv", b"image,label\n\xff\xfe,cat\n", "a.csv is not UTF-8 text"),
        ("a.jsonl", '{"image": "1.jpg", "label": "cat"}\n{"image"', "a.jsonl, line 2: invalid JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected a JSON object, found [1]."),
        ("a.jsonl", '{"image": "1.jpg"}\n', "a.jsonl, line 1: no column label. The columns are image."),
    ],
)
def test_malformed_table_is_rejected_with_its_line(workspace, tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=re.escape(message)):
        _open(workspace, table={"uri": str(tmp_path / name)}).class_names()


def test_missing_table_is_rejected(workspace, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        _open(workspace, table={"uri": str(tmp_path / "a.csv")}).digest()
