"""What each source finds, and what it refuses."""

import contextlib
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
from topwork.data.image_validation import Rejection
from topwork.data.sources import download, open_source
from topwork.errors import DataError, UnavailableError
from topwork.spec.dataset import DatasetSource

CONTENT = {"pets/cat/1.jpg": b"cat one", "pets/cat/more/2.jpg": b"cat two", "pets/dog/1.png": b"dog one"}
LITTER = {
    "pets/cat/.hidden": b"h",
    "pets/dog/Thumbs.db": b"t",
    "pets/README.txt": b"r",
    "__MACOSX/pets/cat/1.jpg": b"m",
}


@pytest.fixture
def here(tmp_path):
    """A workspace without storage."""
    return SimpleNamespace(scratch=tmp_path / "scratch", storage=None, metrics=Metrics())


def _open(here, **source):
    return open_source(DatasetSource.model_validate(source), here)


def _read(source, split="train"):
    """Everything that a source gives: (name, class, bytes or reason)."""
    found = []
    for item in source.items(split):
        try:
            found.append((item.name, item.label, item.read()))
        except Rejection as rejection:
            found.append((item.name, item.label, rejection.reason))
    return found


def _write_folder(root, files):
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


# Folders


def test_folder_finds_images_at_any_depth_and_leaves_litter_out(here, tmp_path):
    _write_folder(tmp_path, CONTENT | LITTER)
    source = _open(here, folder={"uri": str(tmp_path / "pets")})
    assert source.name == "pets"
    assert source.class_names() == ("cat", "dog")
    assert source.splits() == {"train": 3}
    assert _read(source) == [
        ("cat/1.jpg", "cat", b"cat one"),
        ("cat/more/2.jpg", "cat", b"cat two"),
        ("dog/1.png", "dog", b"dog one"),
    ]


def test_folder_digest_changes_with_its_files_alone(here, tmp_path):
    _write_folder(tmp_path, CONTENT)

    def digest():
        return _open(here, folder={"uri": f"{tmp_path}/pets/"}).digest()

    before = digest()
    assert digest() == before
    (tmp_path / "pets/README").write_text("no image")
    assert digest() == before
    (tmp_path / "pets/dog/2.png").write_bytes(b"dog two")
    assert digest() != before


def test_folder_follows_links_but_not_in_circles_and_reports_one_that_leads_nowhere(here, tmp_path):
    _write_folder(tmp_path, CONTENT)
    (tmp_path / "pets/cat/up").symlink_to(tmp_path / "pets")
    (tmp_path / "pets/dog/nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    assert [entry[::2] for entry in _read(_open(here, folder={"uri": str(tmp_path / "pets")}))] == [
        ("cat/1.jpg", b"cat one"),
        ("cat/more/2.jpg", b"cat two"),
        ("dog/1.png", b"dog one"),
        ("dog/nowhere.jpg", "missing"),
    ]


def test_folder_that_is_not_there_or_has_no_class_folders_is_refused(here, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        _open(here, folder={"uri": str(tmp_path / "nothing")}).digest()
    (tmp_path / "1.jpg").write_bytes(b"loose")
    with pytest.raises(DataError, match=r"holds no image in a class folder\. Expected <class>/<image> below it"):
        _open(here, folder={"uri": str(tmp_path)}).digest()


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
def test_archive_is_read_whatever_its_suffix_says(here, tmp_path, kind, name):
    _write_archive(tmp_path / name, kind, CONTENT | LITTER)
    source = _open(here, archive={"uri": str(tmp_path / name), "root": "pets/"})
    assert source.class_names() == ("cat", "dog")
    assert source.splits() == {"train": 3}
    assert _read(source) == [(path, path.split("/")[1], data) for path, data in CONTENT.items()]
    assert source.name == "pets"


# What archives do that mean harm stands in tests/hostile/test_archives.py.


@pytest.mark.parametrize("kind", ["zip", "", "gz", "bz2", "xz"])
def test_pull_refuses_a_truncated_archive(here, tmp_path, kind):
    path = tmp_path / "pets.tar"
    noise = {f"pets/cat/{index}.jpg": hashlib.sha512(bytes([index])).digest() * 20 for index in range(50)}
    _write_archive(path, kind, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"is damaged or cut short|is no archive that can be read"):
        _read(_open(here, archive={"uri": str(path), "root": "pets"}))


def test_a_damaged_member_of_a_zip_is_rejected_and_the_others_are_read(here, tmp_path):
    path = tmp_path / "pets.zip"
    _write_archive(path, "zip", CONTENT)
    path.write_bytes(path.read_bytes().replace(b"cat two", b"cat 2wo"))
    assert [entry[2] for entry in _read(_open(here, archive={"uri": str(path), "root": "pets"}))] == [
        b"cat one",
        "undecodable",
        b"dog one",
    ]


def test_what_is_no_archive_is_refused(here, tmp_path):
    (tmp_path / "pets.zip").write_bytes(b"<html>Not Found</html>" * 100)
    with pytest.raises(DataError, match=r"is no archive that can be read: expected zip, tar, tar\.gz"):
        _open(here, archive={"uri": str(tmp_path / "pets.zip")}).class_names()


def test_a_wrong_root_is_refused_with_what_there_is(here, tmp_path):
    _write_archive(tmp_path / "pets.zip", "zip", CONTENT)
    with pytest.raises(
        DataError, match=re.escape("below PetImages. It holds files in pets/cat, pets/cat/more, pets/dog")
    ):
        _open(here, archive={"uri": str(tmp_path / "pets.zip"), "root": "PetImages"}).class_names()


def test_another_digest_than_the_spec_says_is_refused_and_the_users_file_is_kept(here, tmp_path):
    _write_archive(tmp_path / "pets.zip", "zip", CONTENT)
    with pytest.raises(DataError, match=r"has the SHA-256 [0-9a-f]{64}, but .*sha256 is 0{64}"):
        _open(here, archive={"uri": str(tmp_path / "pets.zip"), "sha256": "0" * 64}).class_names()
    assert (tmp_path / "pets.zip").exists()


# Archives over http


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
        elif self.server.broken_off:
            self.server.broken_off -= 1
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"PK")
            self.close_connection = True
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT_SECONDS", 0.01)
    _write_archive(tmp_path / "pets.zip", "zip", CONTENT)
    (tmp_path / "scratch").mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Handler, directory=str(tmp_path))
    ) as running:
        running.failures = running.broken_off = 0
        running.requests = []
        running.at = f"127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_an_archive_is_downloaded_after_failures_of_the_server(here, server):
    server.failures, server.broken_off = 2, 2
    source = _open(here, archive={"uri": f"http://{server.at}/pets.zip", "root": "pets"})
    assert [entry[2] for entry in _read(source)] == list(CONTENT.values())
    assert len(server.requests) == 5


def test_the_state_of_an_archive_is_told_without_downloading_it(here, server, tmp_path):
    source = _open(here, archive={"uri": f"http://{server.at}/pets.zip", "root": "pets"})
    before = source.digest()
    _write_archive(tmp_path / "pets.zip", "zip", CONTENT | {"pets/dog/2.png": b"dog two"})
    assert source.digest() != before
    assert server.requests == []


def test_a_server_that_keeps_failing_is_unavailable(here, server):
    server.failures = 99
    with pytest.raises(UnavailableError, match=r"could not be fetched in 5 attempts: the server answered 503"):
        _open(here, archive={"uri": f"http://{server.at}/pets.zip"}).class_names()


def test_a_host_that_does_not_answer_is_unavailable(here, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UnavailableError, match="Connection refused"):
        _open(here, archive={"uri": f"http://{server.at}/pets.zip"}).digest()


def test_an_address_that_is_not_there_is_refused_at_once(here, server):
    with pytest.raises(DataError, match=r"/other\.zip can't be fetched: the server answered 404"):
        _open(here, archive={"uri": f"http://{server.at}/other.zip"}).class_names()
    assert len(server.requests) == 1


def test_the_query_of_an_address_is_sent_and_never_shown(here, server):
    source = _open(here, archive={"uri": f"http://{server.at}/pets.zip?id=hidden", "root": "pets"})
    assert source.class_names() == ("cat", "dog")
    assert server.requests == [("GET", "/pets.zip?id=hidden")]
    assert source.description()["archive"]["uri"] == f"http://{server.at}/pets.zip"
    with pytest.raises(DataError) as refused:
        _open(here, archive={"uri": f"http://{server.at}/other.zip?id=hidden"}).class_names()
    assert "hidden" not in str(refused.value)


# Tables


def test_csv_names_images_relative_to_it(here, tmp_path):
    _write_folder(tmp_path, {"set/images/1.jpg": b"one", "set/images/2.jpg": b"two", "three.jpg": b"three"})
    rows = [
        "file,kind",
        "images/1.jpg,cat",
        "images/2.jpg, dog",
        "../three.jpg,cat",
        "images/9.jpg,dog",
        "images/1.jpg,",
    ]
    (tmp_path / "set/labels.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    source = _open(here, table={"uri": str(tmp_path / "set/labels.csv"), "image": "file", "label": "kind"})
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


def test_json_lines_name_images_with_text_or_number_classes(here, tmp_path):
    _write_folder(tmp_path, {"1.jpg": b"one", "2.jpg": b"two"})
    rows = [{"image": "1.jpg", "label": 3, "other": []}, {"image": str(tmp_path / "2.jpg"), "label": "4"}]
    (tmp_path / "labels.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    source = _open(here, table={"uri": str(tmp_path / "labels.jsonl")})
    assert source.class_names() == ("3", "4")
    assert [entry[1:] for entry in _read(source)] == [("3", b"one"), ("4", b"two")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file,label\n1.jpg,cat\n", "a.csv, line 2: no column image. There are file, label."),
        ("a.csv", "", "a.csv has no row."),
        ("a.csv", b"image,label\n\xff\xfe,cat\n", "a.csv is not UTF-8 text"),
        ("a.jsonl", '{"image": "1.jpg", "label": "cat"}\n{"image"', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected an object, found [1]."),
        ("a.jsonl", '{"image": "1.jpg"}\n', "a.jsonl, line 1: no column label. There are image."),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused_with_its_line(here, tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=re.escape(message)):
        _open(here, table={"uri": str(tmp_path / name)}).class_names()


def test_a_table_that_is_not_there_is_refused(here, tmp_path):
    with pytest.raises(DataError, match="does not exist"), contextlib.ExitStack():
        _open(here, table={"uri": str(tmp_path / "a.csv")}).digest()
