"""Random access to the images of a downloaded dataset, through an index over its TFRecord shards."""

# Why not TFDS's array_record format, which has random access built in? It reads 0.03 to 0.08 times as many images per
# second (sequential and random order, one and two processes; medians of interleaved rounds of benchmarks/records.py on
# a 2-core AMD EPYC with AVX2): it reads and parses a whole example, while this index copies the image out of a memory
# map. With JPEG decoding included, the ratio is 0.88 to 1.29, within the noise of a busy machine. But TFDS can't read
# array_record with `as_dataset`, and older datasets, which are stored as TFRecord, would still need this index.

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from topwork.data.dataset_manifest import TFDS_NAME

_INDEX_FILE = "index-1.npz"
# Layout of a TFRecord: length (8 bytes), CRC of the length (4), data, CRC of the data (4). The CRCs are not checked:
# the download has verified the digest of each file.
_HEADER_BYTES, _FOOTER_BYTES = 12, 4

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RecordIndex:
    """An index of all stored examples, by source split in alphabetical order, in stored order within each split.

    Attributes:
        shards: Paths of the TFRecord files.
        shard: int64 (size,), index into `shards` for each image.
        offset: int64 (size,), offset of the encoded image in its shard, in bytes.
        length: int64 (size,), size of the encoded image, in bytes.
        labels: int64 (size,).
        digests: uint64 (size,), first 8 bytes of the pixel digest of each image.
        names: Names of all images, UTF-8, each terminated by a zero byte.
        splits: Position of the first image, and number of images, of each split of the source.
    """

    shards: tuple[Path, ...]
    shard: Int64Array
    offset: Int64Array
    length: Int64Array
    labels: Int64Array
    digests: npt.NDArray[np.uint64]
    names: bytes
    splits: dict[str, tuple[int, int]]

    @cached_property
    def _maps(self) -> tuple[mmap.mmap, ...]:
        maps = []
        for path in self.shards:
            with path.open("rb") as file:
                maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return tuple(maps)

    def read_image(self, position: int) -> bytes:
        """Read the encoded image at a position.

        Args:
            position: Position among all stored examples.

        Returns:
            Bytes of a JPEG or PNG file.
        """
        start = int(self.offset[position])
        return bytes(self._maps[self.shard[position]][start : start + int(self.length[position])])

    @cached_property
    def _all_names(self) -> list[str]:
        return self.names.decode().split("\0")[:-1]

    def image_names(self, positions: Int64Array) -> list[str]:
        """Return the names of the images at the given positions.

        Args:
            positions: int64 (n,), positions among all stored examples.

        Returns:
            Image names, as in the source.
        """
        return [self._all_names[position] for position in positions]


def open_record_index(directory: Path, splits: list[str]) -> RecordIndex:
    """Open the index of a dataset. Builds it on first use and stores it beside the shards for later stages.

    Args:
        directory: Directory of the downloaded TFDS dataset.
        splits: Names of the source splits.

    Returns:
        The index.
    """
    shards = {split: sorted(directory.glob(f"{TFDS_NAME}-{split}.tfrecord-*")) for split in sorted(splits)}
    paths = tuple(path for files in shards.values() for path in files)
    index = directory / _INDEX_FILE
    if not index.exists():
        _write_index(index, paths)
    with np.load(index) as saved:
        arrays = {name: saved[name] for name in saved.files}
    ranges, first = {}, 0
    for split, files in shards.items():
        size = int(sum((arrays["shard"] == paths.index(path)).sum() for path in files))
        ranges[split] = (first, size)
        first += size
    return RecordIndex(shards=paths, splits=ranges, names=arrays.pop("names").tobytes(), **arrays)


def _write_index(index: Path, shards: tuple[Path, ...]) -> None:
    rows: dict[str, list[int]] = {name: [] for name in ("shard", "offset", "length", "labels", "digests")}
    names = bytearray()
    for number, path in enumerate(shards):
        for offset, record in _read_records(path):
            features = tf.train.Example.FromString(record).features.feature
            image = features["image"].bytes_list.value[0]
            rows["shard"].append(number)
            rows["offset"].append(offset + record.index(image))
            rows["length"].append(len(image))
            rows["labels"].append(features["label"].int64_list.value[0])
            rows["digests"].append(int(features["sha256"].bytes_list.value[0][:16], 16))
            names += features["name"].bytes_list.value[0].replace(b"\0", b"") + b"\0"
    arrays = {name: np.array(row, np.uint64 if name == "digests" else np.int64) for name, row in rows.items()}
    part = index.with_name(f"{index.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(file, names=np.frombuffer(bytes(names), np.uint8), allow_pickle=False, **arrays)
    part.replace(index)


def _read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each record of a TFRecord file with its offset in bytes."""
    with path.open("rb") as file:
        position = 0
        while header := file.read(_HEADER_BYTES):
            (length,) = struct.unpack_from("<Q", header)
            yield position + _HEADER_BYTES, file.read(length)
            file.seek(_FOOTER_BYTES, os.SEEK_CUR)
            position += _HEADER_BYTES + length + _FOOTER_BYTES
