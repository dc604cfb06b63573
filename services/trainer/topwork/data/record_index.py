"""The images of a fetched dataset on scratch: where each lies in the TFRecord shards, and what is known of it."""

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

_INDEX = "index-1.npz"
# TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4). The manifest's digests were checked.
_HEAD, _TAIL = 12, 4

Whole = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """All stored examples, split by split in the order of their names, each in stored order.

    Attributes:
        shards: Paths of the TFRecord files.
        shard: int64 (size,), index of the file of each image.
        offset: int64 (size,), bytes before the encoded image in its file.
        length: int64 (size,), bytes of the encoded image.
        labels: int64 (size,).
        digests: uint64 (size,), first 8 bytes of the digest of the pixels.
        names: bytes, the origins of all images, each ended by a zero byte.
        splits: First position and size of each split of the source.
    """

    shards: tuple[Path, ...]
    shard: Whole
    offset: Whole
    length: Whole
    labels: Whole
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

    def encoded(self, position: int) -> bytes:
        """Give the stored file of one image.

        Args:
            position: Which, among all stored examples.

        Returns:
            JPEG or PNG file.
        """
        start = int(self.offset[position])
        return bytes(self._maps[self.shard[position]][start : start + int(self.length[position])])

    @cached_property
    def _names(self) -> list[str]:
        return self.names.decode().split("\0")[:-1]

    def names_of(self, positions: Whole) -> list[str]:
        """Give the origins of images.

        Args:
            positions: int64 (size,), among all stored examples.

        Returns:
            Their names as the source called them.
        """
        return [self._names[position] for position in positions]


def open_records(folder: Path, splits: list[str]) -> Records:
    """Index the shards of a dataset, or read the index that an earlier stage left beside them.

    Args:
        folder: The fetched TFDS dataset.
        splits: Splits of the source.

    Returns:
        Where each image lies.
    """
    shards = {split: sorted(folder.glob(f"{TFDS_NAME}-{split}.tfrecord-*")) for split in sorted(splits)}
    paths = tuple(path for files in shards.values() for path in files)
    index = folder / _INDEX
    if not index.exists():
        _write_index(index, paths)
    with np.load(index) as stored:
        arrays = {name: stored[name] for name in stored.files}
    ranges, first = {}, 0
    for split, files in shards.items():
        size = int(sum((arrays["shard"] == paths.index(path)).sum() for path in files))
        ranges[split] = (first, size)
        first += size
    return Records(shards=paths, splits=ranges, names=arrays.pop("names").tobytes(), **arrays)


def _write_index(index: Path, shards: tuple[Path, ...]) -> None:
    rows: dict[str, list[int]] = {name: [] for name in ("shard", "offset", "length", "labels", "digests")}
    names = bytearray()
    for number, path in enumerate(shards):
        for offset, record in _read(path):
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


def _read(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each record of a TFRecord file with its offset in bytes."""
    with path.open("rb") as file:
        position = 0
        while head := file.read(_HEAD):
            (length,) = struct.unpack_from("<Q", head)
            yield position + _HEAD, file.read(length)
            file.seek(_TAIL, os.SEEK_CUR)
            position += _HEAD + length + _TAIL
