"""Names of classes and images: encodings of archives, Unicode forms, collisions, and roots at the wrong level."""

import io
import os
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from topwork.clients.prometheus.metrics import Metrics
from topwork.data.images.rejection import Rejection
from topwork.data.sources import open_source
from topwork.data.sources.name_encoding import guess_encoding
from topwork.data.sources.source import find_similar_class_names
from topwork.errors import DataError
from topwork.spec.dataset import DatasetSource

CAFE_NFC, CAFE_NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.fixture
def open_dataset(tmp_path):
    workspace = SimpleNamespace(scratch=tmp_path / "scratch", storage=None, metrics=Metrics())
    return lambda **source: open_source(DatasetSource.model_validate(source), workspace)


def write_zip(path, names, *, encoding="utf-8", extra=lambda name: b""):
    """Write a zip file with names in an encoding, without the UTF-8 flag."""

    class RawName(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):
            return self.filename.encode(encoding), self.flag_bits & ~0x800

    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = RawName(name)
            info.extra = extra(name.encode(encoding))
            archive.writestr(info, name.encode())


def write_tar(path, names):
    """Write a tar file with raw names."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as archive:
        for name in names:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))


def touch(path):
    path = Path(os.fsdecode(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.fsencode(path))


def read(source):
    results = []
    for image in source.images("train"):
        try:
            results.append((image.name, image.label, image.read()))
        except Rejection as rejection:
            results.append((image.name, image.label, rejection.detail))
    return results


ENCODINGS = [
    ("utf-8", ["猫", "犬"]),
    ("utf-8", ["кошка", "café"]),
    ("cp932", ["猫", "犬"]),
    ("cp932", ["ネコ", "いぬ", "表"]),
    ("gbk", ["猫", "狗"]),
    ("gbk", ["苹果", "香蕉", "新建文件夹"]),
    ("big5", ["貓", "狗"]),
    ("cp949", ["고양이", "강아지"]),
    ("cp850", ["Bär", "Häher"]),
    ("cp850", ["smørbrød", "thé"]),
    ("cp1252", ["Bär", "Häher"]),
    ("cp1252", ["são", "maçã"]),
    ("cp866", ["кошка", "собака"]),
    ("cp1251", ["Кошка", "Собака"]),
    ("cp852", ["żaba", "łoś"]),
]


@pytest.mark.parametrize(("encoding", "classes"), ENCODINGS, ids=str)
def test_encoding_of_zip_names_without_utf_8_flag_is_guessed_and_reported(open_dataset, tmp_path, encoding, classes):
    write_zip(tmp_path / "a.zip", [f"{name}/1.png" for name in classes], encoding=encoding)
    source = open_dataset(archive={"uri": str(tmp_path / "a.zip")})
    with capture_logs() as logs:
        assert set(source.class_names()) == set(classes)
    assert {label for _, label, _ in read(source)} == set(classes)
    guesses = [entry for entry in logs if "encoding" in entry]
    assert bool(guesses) == (encoding != "utf-8")
    assert all(entry["log_level"] == "warning" and classes[0] in entry["classes"] for entry in guesses)


def test_encoding_in_the_spec_overrides_the_guess(open_dataset, tmp_path):
    write_zip(tmp_path / "a.zip", ["kočka/1.png", "pes/1.png"], encoding="cp1250")
    uri = str(tmp_path / "a.zip")
    assert open_dataset(archive={"uri": uri, "encoding": "cp1250"}).class_names() == ("kočka", "pes")
    with pytest.raises(DataError, match=r"archive\.encoding is utf-8, but the file name 'ko\\xe8ka/1\.png' in the ar"):
        open_dataset(archive={"uri": uri, "encoding": "utf-8"}).class_names()
    assert "encoding" not in open_dataset(archive={"uri": uri}).description()["archive"]
    assert open_dataset(archive={"uri": uri, "encoding": "cp1250"}).description()["archive"]["encoding"] == "cp1250"


def test_unicode_path_field_names_zip_members_if_it_belongs_to_the_name(open_dataset, tmp_path):
    def field(raw, crc_of=None):
        content = b"\1" + struct.pack("<I", zlib.crc32(crc_of or raw)) + "猫/1.png".encode()
        return struct.pack("<HH", 0x7075, len(content)) + content

    write_zip(tmp_path / "a.zip", ["??/1.png"], extra=field)
    write_zip(tmp_path / "b.zip", ["cat/1.png"], extra=lambda raw: field(raw, crc_of=b"other"))
    assert open_dataset(archive={"uri": str(tmp_path / "a.zip")}).class_names() == ("猫",)
    assert open_dataset(archive={"uri": str(tmp_path / "b.zip")}).class_names() == ("cat",)


def test_encoding_of_tar_names_is_guessed_and_pax_names_are_utf_8(open_dataset, tmp_path):
    write_tar(tmp_path / "a.tar", ["Bär/1.png".encode("latin-1"), b"dog/1.png"])
    source = open_dataset(archive={"uri": str(tmp_path / "a.tar")})
    assert source.class_names() == ("Bär", "dog")
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("Bär/1.png"))
    assert open_dataset(archive={"uri": str(tmp_path / "b.tar")}).class_names() == ("Bär",)


def test_guess_covers_all_names_of_an_archive():
    # The first name alone would be valid UTF-8.
    assert guess_encoding(["è".encode(), "狗".encode("gbk")]) == "gbk"


def test_composed_and_decomposed_names_are_one_class_in_folders_archives_and_tables(open_dataset, tmp_path):
    for number, name in enumerate((CAFE_NFC, CAFE_NFD)):
        touch(tmp_path / "folder" / name / f"{number}.png")
    (tmp_path / "labels.csv").write_text(
        f"image,label\nfolder/{CAFE_NFC}/0.png,{CAFE_NFC}\nfolder/{CAFE_NFD}/1.png,{CAFE_NFD}\n", "utf-8"
    )
    write_zip(tmp_path / "a.zip", [f"{CAFE_NFD}/1.png", f"{CAFE_NFC}/2.png"])
    for source, uri in (("folder", "folder"), ("table", "labels.csv"), ("archive", "a.zip")):
        dataset = open_dataset(**{source: {"uri": str(tmp_path / uri)}})
        assert dataset.class_names() == (CAFE_NFC,)
        assert [label for _, label, _ in read(dataset)] == [CAFE_NFC, CAFE_NFC]
        assert [entry.label for entry in dataset.entries()] == [CAFE_NFC, CAFE_NFC]


def test_archive_root_matches_both_unicode_forms(open_dataset, tmp_path):
    write_zip(tmp_path / "a.zip", [f"{CAFE_NFD}/cat/1.png", f"{CAFE_NFD}/dog/1.png"])
    archive = {"uri": str(tmp_path / "a.zip"), "root": CAFE_NFC}
    assert open_dataset(archive=archive).class_names() == ("cat", "dog")


@pytest.mark.parametrize(("stored", "listed"), [(CAFE_NFD, CAFE_NFC), (CAFE_NFC, CAFE_NFD)], ids=["nfd", "nfc"])
def test_table_finds_images_under_the_other_unicode_form(open_dataset, tmp_path, stored, listed):
    touch(tmp_path / stored / f"{stored}.png")
    (tmp_path / "a.csv").write_text(f"image,label\n{listed}/{listed}.png,cat\n", "utf-8")
    dataset = open_dataset(table={"uri": str(tmp_path / "a.csv")})
    assert [data for *_, data in read(dataset)] == [os.fsencode(tmp_path / stored / f"{stored}.png")]
    assert [entry.size for entry in dataset.entries()] == [len(os.fsencode(tmp_path / stored / f"{stored}.png"))]


def test_table_reads_the_file_with_the_exact_name_if_both_forms_exist(open_dataset, tmp_path):
    for name in (CAFE_NFC, CAFE_NFD):
        touch(tmp_path / f"{name}.png")
    (tmp_path / "a.csv").write_text(f"image,label\n{CAFE_NFC}.png,cat\n{CAFE_NFD}.png,dog\n", "utf-8")
    contents = [data for *_, data in read(open_dataset(table={"uri": str(tmp_path / "a.csv")}))]
    assert contents == [os.fsencode(tmp_path / f"{name}.png") for name in (CAFE_NFC, CAFE_NFD)]


COLLISIONS = [(b"caf\xe9", b"caf\xe8"), (b"cat\x01", b"cat\x02"), ("a\u202eb".encode(), "a\u202db".encode())]


@pytest.mark.parametrize("names", COLLISIONS, ids=["latin-1", "control", "direction"])
def test_folders_that_would_get_the_same_class_name_are_rejected(open_dataset, tmp_path, names):
    for name in names:
        touch(os.fsencode(tmp_path) + b"/folder/" + name + b"/1.png")
    with pytest.raises(DataError, match=r"the classes .* and .* would both be named .*\. Rename one"):
        open_dataset(folder={"uri": str(tmp_path / "folder")}).digest()


def test_one_class_with_an_invalid_name_is_allowed_and_its_entries_are_unique(open_dataset, tmp_path):
    for name in (b"caf\xe9/1.png", b"tea/\xe9.png", b"tea/\xe8.png"):
        touch(os.fsencode(tmp_path) + b"/folder/" + name)
    source = open_dataset(folder={"uri": str(tmp_path / "folder")})
    assert source.class_names() == ("caf?", "tea")
    assert [entry.path for entry in source.entries()] == ["caf\\xe9/1.png", "tea/\\xe8.png", "tea/\\xe9.png"]


def test_archives_and_tables_reject_class_names_that_collide(open_dataset, tmp_path):
    write_zip(tmp_path / "a.zip", ["cat\x01/1.png", "cat\x02/1.png"])
    (tmp_path / "a.jsonl").write_text(
        '{"image": "1.png", "label": "cat\\u0001"}\n{"image": "2.png", "label": "cat\\u0002"}'
    )
    for source, uri in (("archive", "a.zip"), ("table", "a.jsonl")):
        with pytest.raises(DataError, match=r"the classes cat\\x01 and cat\\x02 would both be named cat\?"):
            open_dataset(**{source: {"uri": str(tmp_path / uri)}}).class_names()


def test_similar_class_names_ignore_width_and_invisible_characters():
    wide = "\uff43\uff41\uff54"
    assert find_similar_class_names(("cat", wide, "c\u200bat", "dog")) == [f"cat, {wide}, c\u200bat"]


# Ignored directories and wrong roots


def test_empty_classes_loose_images_and_repeated_links_are_reported(open_dataset, tmp_path):
    root = tmp_path / "folder"
    for name in ("cat/1.png", "dog/1.png", "loose.jpg", ".hidden/x.png"):
        touch(root / name)
    (root / "empty").mkdir()
    (root / "a-link").symlink_to(root / "cat")
    (root / "cat" / "loop").symlink_to(root)
    with capture_logs() as logs:
        source = open_dataset(folder={"uri": str(root)})
        assert source.class_names() == ("cat", "dog")
    warnings = {entry["event"]: entry for entry in logs if entry["log_level"] == "warning"}
    assert warnings["class directories without images are ignored"]["names"] == "empty"
    assert warnings["images outside of class directories are ignored"]["names"] == "loose.jpg"
    links = warnings["links to folders that are read under another name are ignored"]
    assert links["count"] == 2
    assert f"a-link -> {root / 'cat'}" in links["links"]
    # A link does not take the images of the directory that it points to.
    assert [name for name, *_ in read(source)] == ["cat/1.png", "dog/1.png"]


def test_empty_class_directory_in_an_archive_is_reported(open_dataset, tmp_path):
    write_zip(tmp_path / "a.zip", ["cat/1.png", "dog/1.png", "bird/"])
    with capture_logs() as logs:
        open_dataset(archive={"uri": str(tmp_path / "a.zip")}).class_names()
    assert [entry["names"] for entry in logs] == ["bird"]


LEVELS = [
    (["pets/cat/1.png", "pets/dog/1.png"], "", "Set spec.dataset.source.archive.root to pets."),
    (["a/pets/cat/1.png", "a/pets/dog/1.png"], "a", "Set spec.dataset.source.archive.root to a/pets."),
    (["train/cat/1.png", "test/cat/1.png"], "", "directories of splits (test, train)"),
    (["pets/cat/1.png", "pets/cat/2.png"], "pets/cat", "may be one level too low"),
]


@pytest.mark.parametrize(("names", "root", "message"), LEVELS, ids=["high", "deep", "splits", "low"])
def test_root_at_the_wrong_level_is_rejected_with_the_folder_that_was_found(
    open_dataset, tmp_path, names, root, message
):
    write_zip(tmp_path / "a.zip", names)
    with pytest.raises(DataError) as error:
        open_dataset(archive={"uri": str(tmp_path / "a.zip"), "root": root}).class_names()
    assert message in str(error.value)
    for name in names:
        touch(tmp_path / "folder" / name)
    with pytest.raises(DataError, match=r"folder\.uri to "):
        open_dataset(folder={"uri": str(tmp_path / "folder" / root)}).class_names()


def test_entries_are_listed_for_folders_tables_and_local_zip_files_only(open_dataset, tmp_path):
    touch(tmp_path / "folder/cat/1.png")
    write_zip(tmp_path / "a.zip", ["cat/1.png"])
    write_tar(tmp_path / "a.tar", [b"cat/1.png"])
    (folder_entry,) = open_dataset(folder={"uri": str(tmp_path / "folder")}).entries()
    stat = (tmp_path / "folder/cat/1.png").stat()
    assert (folder_entry.path, folder_entry.label) == ("cat/1.png", "cat")
    assert (folder_entry.size, folder_entry.version) == (stat.st_size, str(stat.st_mtime_ns))
    (zip_entry,) = open_dataset(archive={"uri": str(tmp_path / "a.zip")}).entries()
    assert (zip_entry.size, zip_entry.version) == (9, f"{zlib.crc32(b'cat/1.png'):08x}")
    assert open_dataset(archive={"uri": str(tmp_path / "a.tar")}).entries() is None
    assert open_dataset(archive={"uri": "https://example.com/a.zip", "sha256": "0" * 64}).entries() is None


def test_table_digest_changes_with_an_image_at_the_same_path(open_dataset, tmp_path):
    touch(tmp_path / "1.png")
    (tmp_path / "a.csv").write_text("image,label\n1.png,cat\n")
    before = open_dataset(table={"uri": str(tmp_path / "a.csv")}).digest()
    assert open_dataset(table={"uri": str(tmp_path / "a.csv")}).digest() == before
    (tmp_path / "1.png").write_bytes(b"other")
    assert open_dataset(table={"uri": str(tmp_path / "a.csv")}).digest() != before


MISSING = [
    ("images/1", "images/1.png does; add the suffix"),
    ("images\\1.png", "images/1.png does; use forward slashes"),
    ("/images/1.png", "images/1.png does; remove the leading slash"),
    ("images/1.PNG", "images/1.png does; upper and lower case differ"),
    ("images/1.jpg", "images/1.png does; the suffix differs"),
    ("1.png", "use images/1.png"),
    ("set/images/1.png", "use images/1.png"),
    ("C:\\images\\1.png", "it has a drive letter"),
    ("file:///images/1.png", "remove file://"),
    ("https://host/1.png", "tables cannot download images"),
    ("gs://bucket/1.png", "gs:// is not supported"),
    ("images/9.webp", "set/images/9.webp does not exist"),
]


@pytest.mark.parametrize(("path", "hint"), MISSING, ids=[path for path, _ in MISSING])
def test_missing_image_of_a_table_shows_the_path_that_was_tried_and_a_hint(open_dataset, tmp_path, path, hint):
    touch(tmp_path / "set/images/1.png")
    (tmp_path / "set/a.csv").write_text(f"image,label\n{path},cat\n")
    ((_, _, detail),) = read(open_dataset(table={"uri": str(tmp_path / "set/a.csv")}))
    assert "does not exist" in detail
    assert hint in detail
