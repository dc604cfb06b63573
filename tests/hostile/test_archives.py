"""Hostile archives: the archive or its hostile members are rejected, without filling memory or disk."""

import gzip
import io
import lzma
import random
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from topwork.data.images.image_validation import Rejection, validate_image
from topwork.data.sources import archive_limits, open_source
from topwork.errors import DataError
from topwork.spec.dataset import DatasetSource

GOOD = {"cat/1.jpg": b"cat one", "dog/1.jpg": b"dog one"}
BLOCK = 512
MIB = 2**20


def open_archive_source(path: Path, scratch: Path):
    return open_source(
        DatasetSource.model_validate({"archive": {"uri": str(path)}}), SimpleNamespace(scratch=scratch, storage=None)
    )


def read_all(path: Path) -> list[tuple[str, bytes | str]]:
    """Read an archive as (name, bytes or rejection reason) and check that it writes no files."""
    before = sorted(path.parent.rglob("*"))
    source = open_archive_source(path, path.parent)
    source.class_names()
    results: list[tuple[str, bytes | str]] = []
    for image in source.images("train"):
        try:
            results.append((image.name, image.read()))
        except Rejection as rejection:
            results.append((image.name, rejection.reason))
    assert sorted(path.parent.rglob("*")) == before
    return results


# Zip


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def blank_image_zip(path: Path) -> None:
    write_zip(path, {f"cat/{number}.bmp": bytes(20 * MIB) for number in range(3)}, zipfile.ZIP_DEFLATED)


def overlapping_zip(path: Path) -> None:
    """900 directory entries share the bytes of one member: about 100 KB unpack to 54 GB."""
    body = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = bytes(60 * MIB)
    packed = body.compress(content) + body.flush()
    fields = (20, 0, 8, 0, 0, zlib.crc32(content), len(packed), len(content), 9, 0)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", *fields) + b"cat/1.bmp" + packed
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, *fields, 0, 0, 0, 0, 0) + b"cat/1.bmp"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 900, 900, 900 * len(entry), len(local), 0)
    path.write_bytes(local + 900 * entry + end)


def zip_with_many_entries(path: Path) -> None:
    write_zip(path, {f"cat/{number}.jpg": b"" for number in range(1001)})


def zip_with_false_entry_count(path: Path) -> None:
    zip_with_many_entries(path)
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    data[end + 8 : end + 12] = struct.pack("<2H", 1, 1)
    path.write_bytes(data)


def zip_with_long_names(path: Path) -> None:
    write_zip(path, {f"cat/{number}{'x' * 60_000}.jpg": b"" for number in range(40)})


def encrypted_zip(path: Path) -> None:
    write_zip(path, GOOD)
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)


def zip_with_future_version(path: Path) -> None:
    write_zip(path, GOOD)
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\1\2") + 6] = 255
    path.write_bytes(data)


# Tar


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def bomb(mode: str, size: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_tar(path, {"cat/1.bmp": bytes(size)}, mode)

    return write


def tar_with_many_entries(path: Path) -> None:
    write_tar(path, {f"cat/{number}.jpg": b"" for number in range(1001)})


def tar_with_many_directories(path: Path) -> None:
    path.write_bytes(b"".join(header(f"{number}/", tarfile.DIRTYPE) for number in range(1001)) + bytes(2 * BLOCK))


def header_bomb(kind: bytes) -> Callable[[Path], None]:
    """A header of 200 MiB before a file: tarfile would read all of it into memory."""

    def write(path: Path) -> None:
        with gzip.open(path, "wb", 1) as file:
            file.write(header("x", kind, 200 * MIB))
            for _ in range(200):
                file.write(bytes(MIB))

    return write


def header_chain(path: Path) -> None:
    """2,000 pax headers, each followed by another."""
    record = b"13 comment=x\n"
    with gzip.open(path, "wb") as file:
        for _ in range(2_000):
            file.write(header("x", tarfile.XHDTYPE, len(record)) + record.ljust(BLOCK, b"\0"))


def sparse_tar(path: Path) -> None:
    path.write_bytes(header("cat/1.jpg", tarfile.GNUTYPE_SPARSE, 0) + bytes(2 * BLOCK))


def pax_sparse_tar(path: Path) -> None:
    info = tarfile.TarInfo("cat/1.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**50)}
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(4 * BLOCK))


def tar_with_negative_size(path: Path) -> None:
    data = bytearray(header("cat/1.jpg"))
    data[124:136] = b"\xff" * 12
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 8 * 32)
    path.write_bytes(bytes(data) + bytes(2 * BLOCK))


def memory_hungry_xz(path: Path) -> None:
    """An xz file of a few bytes that requests 4 GiB of memory."""
    write_tar(path.with_suffix(".plain"), GOOD)
    data = bytearray(lzma.compress(path.with_suffix(".plain").read_bytes()))
    path.with_suffix(".plain").unlink()
    length = 4 * (data[12] + 1)
    data[16] = 40
    data[12 + length - 4 : 12 + length] = struct.pack("<I", zlib.crc32(data[12 : 12 + length - 4]))
    path.write_bytes(data)


BOMB = "This looks like a decompression bomb"
MANY = "entries, or its entry names are too long"
REJECTED_ARCHIVES = [
    (blank_image_zip, BOMB),
    (overlapping_zip, BOMB),
    (zip_with_many_entries, MANY),
    (zip_with_false_entry_count, MANY),
    (zip_with_long_names, MANY),
    (encrypted_zip, "is encrypted"),
    (zip_with_future_version, "is damaged or truncated: zip file version"),
    (bomb("w:gz", 60 * MIB), BOMB),
    (bomb("w:bz2", 60 * MIB), BOMB),
    (bomb("w:xz", 60 * MIB), BOMB),
    (tar_with_many_entries, MANY),
    (tar_with_many_directories, MANY),
    (header_bomb(tarfile.XHDTYPE), "a header has 209715200 bytes"),
    (header_bomb(tarfile.XGLTYPE), "a header has 209715200 bytes"),
    (header_bomb(tarfile.GNUTYPE_LONGNAME), "a header has 209715200 bytes"),
    (header_chain, "maximum recursion depth"),
    (sparse_tar, "a sparse file"),
    (pax_sparse_tar, "a sparse file"),
    (tar_with_negative_size, "a file has a size of -1 bytes"),
    (memory_hungry_xz, "Memory usage limit"),
]


@pytest.mark.parametrize(
    ("write", "message"),
    REJECTED_ARCHIVES,
    ids=[f"{number}-{message[:12]}" for number, (_, message) in enumerate(REJECTED_ARCHIVES)],
)
def test_hostile_archive_is_rejected_in_little_memory(tmp_path, monkeypatch, write, message):
    monkeypatch.setattr(archive_limits, "MIN_LIMIT_BYTES", 40 * MIB)
    monkeypatch.setattr(archive_limits, "MAX_MEMBERS", 1000)
    monkeypatch.setattr(archive_limits, "MAX_ZIP_DIRECTORY_BYTES", 2 * MIB)
    write(tmp_path / "a.tar")
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as error:
            read_all(tmp_path / "a.tar")
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    assert message in str(error.value)
    assert str(tmp_path / "a.tar") in str(error.value)


def test_archive_limits_allow_compressed_images(tmp_path):
    noise = random.Random(0).randbytes(MIB)
    files = {f"{name}/{number}.png": noise for name in ("cat", "dog") for number in range(4)}
    for path in (write_zip(tmp_path / "a.zip", files), write_tar(tmp_path / "a.tar.xz", files, "w:xz")):
        assert [data for _, data in read_all(path)] == [noise] * 8


def links(path: Path) -> None:
    write_tar(path, {})
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("symbolic", tarfile.SYMTYPE),
            ("hard", tarfile.LNKTYPE),
            ("characters", tarfile.CHRTYPE),
            ("blocks", tarfile.BLKTYPE),
            ("pipe", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(f"cat/{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)


def link_in_a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("cat/symbolic.jpg")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")


def member_named(name: str, kind: str = "tar") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (write_tar if kind == "tar" else write_zip)(path, {name: b"evil"})

    return write


def zip_with_false_size(path: Path) -> None:
    """The directory declares 5 bytes, the member has 5,000."""
    write_zip(path, {"cat/0.jpg": b"x" * 5000}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    for offset in (data.find(b"PK\1\2") + 24, data.find(b"PK\3\4") + 22):
        data[offset : offset + 4] = struct.pack("<I", 5)
    path.write_bytes(data)


def zip_with_an_unknown_method(path: Path) -> None:
    write_zip(path, {"cat/0.jpg": b"x"})
    data = bytearray(path.read_bytes())
    for offset in (data.find(b"PK\1\2") + 10, data.find(b"PK\3\4") + 8):
        data[offset : offset + 2] = struct.pack("<H", 99)
    path.write_bytes(data)


REJECTED_MEMBERS = [
    (links, ["unsafe member"] * 5),
    (link_in_a_zip, ["unsafe member"]),
    (member_named("../evil.jpg"), ["unsafe member"]),
    (member_named("cat/../../evil.jpg", "zip"), ["unsafe member"]),
    (member_named("/etc/evil.jpg"), ["unsafe member"]),
    (member_named("C:\\cat\\evil.jpg", "zip"), ["unsafe member"]),
    (member_named("..\\..\\evil.jpg"), ["unsafe member"]),
    (member_named("cat/" + "deep/" * 40 + "evil.jpg"), ["unsafe member"]),
    (member_named("cat/" + "x" * 2000 + ".jpg"), ["unsafe member"]),
    (bomb("w:gz", 65 * MIB), ["too large"]),
    (zip_with_false_size, ["undecodable"]),
    (zip_with_an_unknown_method, ["undecodable"]),
]


@pytest.mark.parametrize(("write", "reasons"), REJECTED_MEMBERS, ids=list(map(str, range(len(REJECTED_MEMBERS)))))
def test_hostile_members_are_rejected_and_the_others_are_read(tmp_path, write, reasons):
    path = tmp_path / "a.tar"
    write(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path, "a") as archive:
            for name, data in GOOD.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path) as hostile, tarfile.open(tmp_path / "b.tar", "w") as combined:
            for info in hostile:
                combined.addfile(info, hostile.extractfile(info) if info.isreg() else None)
            for name, data in GOOD.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                combined.addfile(info, io.BytesIO(data))
        path = (tmp_path / "b.tar").rename(path)
    assert [outcome for _, outcome in read_all(path)] == [*reasons, *GOOD.values()]


def test_control_characters_in_member_names_are_replaced(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"c\x1b[2Jat/1\n.jpg": b"one", "dog/\u202egpj.exe": b"two"})
    assert read_all(path) == [("c?[2Jat/1?.jpg", b"one"), ("dog/?gpj.exe", b"two")]
    assert open_archive_source(path, tmp_path).class_names() == ("c?[2Jat", "dog")


def test_nested_archive_is_not_opened(tmp_path):
    inner = write_zip(tmp_path / "inner.zip", {"cat/1.bmp": bytes(60 * MIB)}, zipfile.ZIP_DEFLATED).read_bytes()
    path = write_zip(tmp_path / "a.zip", {"cat/0.jpg": inner, **GOOD})
    assert read_all(path)[0] == ("cat/0.jpg", inner)
    with pytest.raises(Rejection) as rejected:
        validate_image(inner)
    assert rejected.value.reason == "unknown format"


UNEXPECTED = [
    (
        b"<!DOCTYPE html>\n<html><head><title>Sign in &amp; go</title>" + b" " * 2000,
        'HTML page with the title "Sign in & go"',
    ),
    (b"\xef\xbb\xbf \n<!-- x --><HTML><body>Too many requests", "an HTML page, such as a login form"),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>No</Message></Error>', "AccessDenied: No"),
    (b'{"message": "Not Found", "status": "404"}', 'a JSON document: {"message": "Not Found"'),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer"),
    (b"", "It is empty"),
    (b"7z\xbc\xaf\x27\x1c" + bytes(600), "a 7-Zip archive, which is not supported"),
    (b"PK\x03\x04" + bytes(600), "begins like a zip file, but its end is missing"),
    (b"<html><title>" + b"x" * 5000 + b"\x1b[2J</title>", "x" * 100 + "…"),
]


@pytest.mark.parametrize(("content", "message"), UNEXPECTED, ids=list(map(str, range(len(UNEXPECTED)))))
def test_file_that_is_no_archive_is_described(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match="is not a readable archive") as error:
        read_all(tmp_path / "a.tar")
    assert message in str(error.value)
    assert len(str(error.value)) < 500


def test_random_damage_to_an_archive_raises_only_data_errors(tmp_path):
    rng = random.Random(5)
    archives = [write_zip(tmp_path / "a.zip", GOOD, zipfile.ZIP_DEFLATED).read_bytes()]
    modes = ("w", "w:gz", "w:bz2", "w:xz")
    archives += [write_tar(tmp_path / f"a{mode[2:]}", GOOD, mode).read_bytes() for mode in modes]
    rejected = 0
    for number in range(400):
        data = bytearray(archives[number % len(archives)])
        for _ in range(rng.randint(1, 6)):
            # Half of the damage hits the first header.
            offset = rng.choice([rng.randrange(len(data)), rng.randrange(min(160, len(data)))])
            data[offset] = rng.randrange(256)
        (tmp_path / "damaged.tar").write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            read_all(tmp_path / "damaged.tar")
        except DataError:
            rejected += 1
    assert rejected > 100
