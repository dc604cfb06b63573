"""Images of unusual formats, from the source to training batches."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from topwork.data.batches import evaluation_batches
from topwork.data.local_dataset import fetch_dataset
from topwork.errors import DataError
from topwork.stages.pull import pull


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with_metadata(*chunks: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 36), "blue").save(file, "PNG")
    return file.getvalue()[:33] + b"".join(chunks) + file.getvalue()[33:]


METADATA = {
    "text": _chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(8 * 2**20))),
    "profile": _chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(8 * 2**20))),
    "damaged profile": _chunk(b"iCCP", b"profile\0\0not compressed"),
    "damaged text": _chunk(b"zTXt", b"x"),
    "checksum": _chunk(b"tEXt", b"note\0text")[:-1] + b"\0",
    "exif": _chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
}


def test_metadata_does_not_reject_an_image(make_job, workspace, two_class_folder):
    for name, chunk in METADATA.items():
        (two_class_folder / "blue" / f"{name}.png").write_bytes(png_with_metadata(chunk))
    (two_class_folder / "blue" / "many.png").write_bytes(
        png_with_metadata(*[_chunk(b"tEXt", b"note\0" + bytes(10**5)) for _ in range(100)])
    )
    jpeg = (two_class_folder / "blue" / "00.jpg").read_bytes()
    for number, segment in enumerate((b"\xff\xe1\0\x08Exif\0\0", b"\xff\xe2\0\x04ab", b"\xff\xed\0\x05abc")):
        (two_class_folder / "blue" / f"segment-{number}.jpg").write_bytes(jpeg[:2] + segment + jpeg[2:])
    metadata = pull(make_job(), workspace).metadata
    assert metadata.rejected == ()
    assert metadata.images == 40 + len(METADATA) + 4


def test_rejection_names_the_detail(make_job, workspace, two_class_folder):
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(two_class_folder / "red" / "nan.tif")
    job = make_job()
    strict = make_job(dataset={**job.spec.dataset.model_dump(by_alias=True), "onCorruptImage": "fail"})
    with pytest.raises(DataError, match=r"red/nan\.tif \(unknown format: floating-point pixels contain NaN"):
        pull(strict, workspace)


@pytest.fixture
def xray_folder(two_class_folder):
    """The two classes as 12-bit TIFF, some transparent PNG and rotated JPEG files, and a TIFF with two pages."""
    for path in sorted(two_class_folder.rglob("*.jpg")):
        number = int(path.stem)
        if number >= 10:
            with Image.open(path) as image:
                bright = np.asarray(image)[..., 0].astype(np.uint16) * 16
            path.unlink()
            pages = [Image.fromarray(bright)] * (2 if number == 10 else 1)
            pages[0].save(path.with_suffix(".tif"), save_all=len(pages) > 1, append_images=pages[1:])
    Image.new("RGBA", (40, 36), (0, 0, 0, 0)).save(two_class_folder / "red" / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(two_class_folder / "red" / "rotated.jpg", exif=exif)
    return two_class_folder


def test_pull_records_kinds_source_files_and_values(make_job, workspace, xray_folder):
    job = make_job()
    stored = pull(job, workspace)
    metadata = stored.metadata
    assert metadata.kinds == {
        "JPEG RGB": 10,
        "JPEG RGB, EXIF orientation": 1,
        "PNG RGBA, transparency": 1,
        "PNG RGB": 20,
        "TIFF 16-bit grayscale": 8,
        "TIFF 16-bit grayscale, several frames": 2,
    }
    assert {original.kind: original.is_servable for original in metadata.originals} == {
        kind: not kind.startswith("TIFF") for kind in metadata.kinds
    }
    for original in metadata.originals:
        assert workspace.storage.read(f"{stored.prefix}/{original.file}") == (xray_folder / original.name).read_bytes()
    assert (metadata.values.images, metadata.values.automatic_range) == (10, (0.0, 4095.0))
    with capture_logs() as entries:
        dataset = fetch_dataset(stored, job, workspace)
    logged = {entry["event"]: entry for entry in entries}
    assert (logged["value range"]["low"], logged["value range"]["high"]) == (0.0, 4095.0)
    assert logged["only the first page or frame is used"]["images"] == 2
    splits = {
        split.names[index]: (split, index)
        for split in (dataset.train, dataset.validation, dataset.test)
        for index in range(split.size)
    }
    split, index = splits["red/alpha.png"]
    assert (split.load_images(np.array([index])) == 255).all()
    split, index = splits["red/16.tif"]
    assert split.load_images(np.array([index])).mean() > 100  # red is bright in the red channel


@pytest.mark.parametrize(("setting", "white"), [("full", 65535), ([0, 8190], 8190)])
def test_value_range_of_the_spec_changes_the_pixels_of_the_same_dataset(
    make_job, workspace, xray_folder, setting, white
):
    automatic = make_job()
    content = automatic.spec.dataset.model_dump(by_alias=True)
    job = make_job(dataset={**content, "valueRange": setting})
    stored = pull(automatic, workspace)
    assert pull(job, workspace).prefix == stored.prefix
    expected = fetch_dataset(stored, automatic, workspace).train
    train = fetch_dataset(stored, job, workspace).train
    index = next(index for index, name in enumerate(train.names) if name.startswith("red") and name.endswith(".tif"))
    bright, dark = (split.load_images(np.array([index])).mean() for split in (expected, train))
    assert dark == pytest.approx(bright * 4095 / white, abs=1)
    ((images, _, _),) = evaluation_batches(train, classes=2, batch_size=train.size)
    assert np.array_equal(images.numpy()[index], train.load_images(np.array([index]))[0])
