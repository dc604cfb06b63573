"""Archives that mean harm: each is refused or loses its bad members, and never fills memory, disk or hours."""

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

from topwork.data.image_validation import Rejection, prove
from topwork.data.sources import archive_limits, open_source
from topwork.errors import DataError
from topwork.spec.dataset import DatasetSource

GOOD = {"cat/1.jpg": b"cat one", "dog/1.jpg": b"dog one"}
BLOCK = 512
MIB = 2**20


def opened(path: Path, scratch: Path):
    return open_source(
        DatasetSource.model_validate({"archive": {"uri": str(path)}}), SimpleNamespace(scratch=scratch, storage=None)
    )


def read_all(path: Path) -> list[tuple[str, bytes | str]]:
    """Everything that an archive gives: (name, bytes or reason). Nothing may be written beside it meanwhile."""
    before = sorted(path.parent.rglob("*"))
    source = opened(path, path.parent)
    source.class_names()
    found: list[tuple[str, bytes | str]] = []
    for item in source.items("train"):
        try:
            found.append((item.name, item.read()))
        except Rejection as rejection:
            found.append((item.name, rejection.reason))
    assert sorted(path.parent.rglob("*")) == before
    return found


# Zip


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def zip_of_blanks(path: Path) -> None:
    zipped(path, {f"cat/{number}.bmp": bytes(20 * MIB) for number in range(3)}, zipfile.ZIP_DEFLATED)


def zip_of_overlapping_members(path: Path) -> None:
    """900 entries of the directory share the bytes of one member: 54 GB out of some 100 KB."""
    body = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = bytes(60 * MIB)
    packed = body.compress(content) + body.flush()
    fields = (20, 0, 8, 0, 0, zlib.crc32(content), len(packed), len(content), 9, 0)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", *fields) + b"cat/1.bmp" + packed
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, *fields, 0, 0, 0, 0, 0) + b"cat/1.bmp"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 900, 900, 900 * len(entry), len(local), 0)
    path.write_bytes(local + 900 * entry + end)


def zip_of_many(path: Path) -> None:
    zipped(path, {f"cat/{number}.jpg": b"" for number in range(1001)})


def zip_of_many_that_claims_one(path: Path) -> None:
    zip_of_many(path)
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\5\6")
    data[end + 8 : end + 12] = struct.pack("<2H", 1, 1)
    path.write_bytes(data)


def zip_with_endless_names(path: Path) -> None:
    zipped(path, {f"cat/{number}{'x' * 60_000}.jpg": b"" for number in range(40)})


def encrypted_zip(path: Path) -> None:
    zipped(path, GOOD)
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)


def zip_of_a_later_version(path: Path) -> None:
    zipped(path, GOOD)
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\1\2") + 6] = 255
    path.write_bytes(data)


# Tar


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def tarred(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def bomb(mode: str, size: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tarred(path, {"cat/1.bmp": bytes(size)}, mode)

    return write


def tar_of_many(path: Path) -> None:
    tarred(path, {f"cat/{number}.jpg": b"" for number in range(1001)})


def header_bomb(kind: bytes) -> Callable[[Path], None]:
    """One header before a file that says it is 200 MiB long, and is: the parser would read it into memory whole."""

    def write(path: Path) -> None:
        with gzip.open(path, "wb", 1) as file:
            file.write(header("x", kind, 200 * MIB))
            for _ in range(200):
                file.write(bytes(MIB))

    return write


def endless_headers(path: Path) -> None:
    """2,000 pax headers, each of which goes before the next."""
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


def tar_with_a_negative_size(path: Path) -> None:
    data = bytearray(header("cat/1.jpg"))
    data[124:136] = b"\xff" * 12
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 8 * 32)
    path.write_bytes(bytes(data) + bytes(2 * BLOCK))


def greedy_xz(path: Path) -> None:
    """An xz file of a few bytes that asks for 4 GiB of memory."""
    tarred(path.with_suffix(".plain"), GOOD)
    data = bytearray(lzma.compress(path.with_suffix(".plain").read_bytes()))
    path.with_suffix(".plain").unlink()
    length = 4 * (data[12] + 1)
    data[16] = 40
    data[12 + length - 4 : 12 + length] = struct.pack("<I", zlib.crc32(data[12 : 12 + length - 4]))
    path.write_bytes(data)


BOMB = "Such an archive is a bomb"
MANY = "entries, or their names are too long"
REFUSED = [
    (zip_of_blanks, BOMB),
    (zip_of_overlapping_members, BOMB),
    (zip_of_many, MANY),
    (zip_of_many_that_claims_one, MANY),
    (zip_with_endless_names, MANY),
    (encrypted_zip, "is encrypted"),
    (zip_of_a_later_version, "is damaged or cut short: zip file version"),
    (bomb("w:gz", 60 * MIB), BOMB),
    (bomb("w:bz2", 60 * MIB), BOMB),
    (bomb("w:xz", 60 * MIB), BOMB),
    (tar_of_many, MANY),
    (header_bomb(tarfile.XHDTYPE), "a header of 209715200 bytes"),
    (header_bomb(tarfile.XGLTYPE), "a header of 209715200 bytes"),
    (header_bomb(tarfile.GNUTYPE_LONGNAME), "a header of 209715200 bytes"),
    (endless_headers, "maximum recursion depth"),
    (sparse_tar, "a sparse file"),
    (pax_sparse_tar, "a sparse file"),
    (tar_with_a_negative_size, "a file of -1 bytes"),
    (greedy_xz, "Memory usage limit"),
]


@pytest.mark.parametrize(
    ("write", "message"), REFUSED, ids=[f"{number}-{message[:12]}" for number, (_, message) in enumerate(REFUSED)]
)
def test_a_hostile_archive_is_refused_before_it_fills_memory(tmp_path, monkeypatch, write, message):
    monkeypatch.setattr(archive_limits, "FREE_BYTES", 40 * MIB)
    monkeypatch.setattr(archive_limits, "MAX_MEMBERS", 1000)
    monkeypatch.setattr(archive_limits, "MAX_DIRECTORY_BYTES", 2 * MIB)
    write(tmp_path / "a.tar")
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as refused:
            read_all(tmp_path / "a.tar")
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    assert message in str(refused.value)
    assert str(tmp_path / "a.tar") in str(refused.value)


def test_the_limits_themselves_let_a_packed_set_of_images_through(tmp_path):
    noise = random.Random(0).randbytes(MIB)
    files = {f"{name}/{number}.png": noise for name in ("cat", "dog") for number in range(4)}
    for path in (zipped(tmp_path / "a.zip", files), tarred(tmp_path / "a.tar.xz", files, "w:xz")):
        assert [data for _, data in read_all(path)] == [noise] * 8


def links(path: Path) -> None:
    tarred(path, {})
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


def named(name: str, kind: str = "tar") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (tarred if kind == "tar" else zipped)(path, {name: b"evil"})

    return write


def zip_that_understates(path: Path) -> None:
    """The directory says 5 bytes, the member has 5,000."""
    zipped(path, {"cat/0.jpg": b"x" * 5000}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    for place in (data.find(b"PK\1\2") + 24, data.find(b"PK\3\4") + 22):
        data[place : place + 4] = struct.pack("<I", 5)
    path.write_bytes(data)


def zip_with_an_unknown_method(path: Path) -> None:
    zipped(path, {"cat/0.jpg": b"x"})
    data = bytearray(path.read_bytes())
    for place in (data.find(b"PK\1\2") + 10, data.find(b"PK\3\4") + 8):
        data[place : place + 2] = struct.pack("<H", 99)
    path.write_bytes(data)


REJECTED = [
    (links, ["unsafe member"] * 5),
    (link_in_a_zip, ["unsafe member"]),
    (named("../evil.jpg"), ["unsafe member"]),
    (named("cat/../../evil.jpg", "zip"), ["unsafe member"]),
    (named("/etc/evil.jpg"), ["unsafe member"]),
    (named("C:\\cat\\evil.jpg", "zip"), ["unsafe member"]),
    (named("..\\..\\evil.jpg"), ["unsafe member"]),
    (named("cat/" + "deep/" * 40 + "evil.jpg"), ["unsafe member"]),
    (named("cat/" + "x" * 2000 + ".jpg"), ["unsafe member"]),
    (bomb("w:gz", 65 * MIB), ["too large"]),
    (zip_that_understates, ["undecodable"]),
    (zip_with_an_unknown_method, ["undecodable"]),
]


@pytest.mark.parametrize(("write", "reasons"), REJECTED, ids=[str(number) for number in range(len(REJECTED))])
def test_hostile_members_are_left_out_and_the_others_are_read(tmp_path, write, reasons):
    path = tmp_path / "a.tar"
    write(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path, "a") as archive:
            for name, data in GOOD.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path) as given, tarfile.open(tmp_path / "b.tar", "w") as whole:
            for info in given:
                whole.addfile(info, given.extractfile(info) if info.isreg() else None)
            for name, data in GOOD.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                whole.addfile(info, io.BytesIO(data))
        path = (tmp_path / "b.tar").rename(path)
    assert [outcome for _, outcome in read_all(path)] == [*reasons, *GOOD.values()]


def test_names_that_would_write_over_a_terminal_or_break_a_line_are_shown_harmless(tmp_path):
    path = tarred(tmp_path / "a.tar", {"c\x1b[2Jat/1\n.jpg": b"one", "dog/\u202egpj.exe": b"two"})
    assert read_all(path) == [("c?[2Jat/1?.jpg", b"one"), ("dog/?gpj.exe", b"two")]
    assert opened(path, tmp_path).class_names() == ("c?[2Jat", "dog")


def test_an_archive_in_an_archive_is_never_opened(tmp_path):
    inner = zipped(tmp_path / "inner.zip", {"cat/1.bmp": bytes(60 * MIB)}, zipfile.ZIP_DEFLATED).read_bytes()
    path = zipped(tmp_path / "a.zip", {"cat/0.jpg": inner, **GOOD})
    assert read_all(path)[0] == ("cat/0.jpg", inner)
    with pytest.raises(Rejection) as rejected:
        prove(inner)
    assert rejected.value.reason == "unknown format"


def test_any_damage_to_an_archive_ends_in_a_sentence(tmp_path):
    chance = random.Random(5)
    whole = [zipped(tmp_path / "a.zip", GOOD, zipfile.ZIP_DEFLATED).read_bytes()]
    whole += [tarred(tmp_path / f"a{mode[2:]}", GOOD, mode).read_bytes() for mode in ("w", "w:gz", "w:bz2", "w:xz")]
    refused = 0
    for number in range(400):
        data = bytearray(whole[number % len(whole)])
        for _ in range(chance.randint(1, 6)):
            # Where the structure is: in the headers of a tar, in both ends of all others.
            place = chance.choice([chance.randrange(len(data)), chance.randrange(min(160, len(data)))])
            data[place] = chance.randrange(256)
        (tmp_path / "damaged.tar").write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
        try:
            read_all(tmp_path / "damaged.tar")
        except DataError:
            refused += 1
    assert refused > 100
