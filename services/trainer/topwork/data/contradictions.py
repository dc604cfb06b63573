"""Images with identical pixels and different classes: finds them in a written dataset, and removes them."""

import json
from collections.abc import Iterator, Set
from pathlib import Path

import tensorflow as tf

from topwork.data.dataset_manifest import TFDS_NAME, Contradictions, DatasetMetadata, LabeledImage

MAX_GROUPS = 100
"""Contradictions that are recorded with the names of their images."""

MAX_IMAGES = 10
"""Images that are recorded for each contradiction."""

_INFO_FILE = "dataset_info.json"
_Group = list[tuple[str, str, str]]
"""Split, name and class of images with the same pixels."""


def resolve_contradictions(
    directory: Path, metadata: DatasetMetadata, digests: Set[bytes], *, drop: bool
) -> DatasetMetadata:
    """Record the contradictions of a dataset, and remove all images of each if `drop` is set.

    The order of the other images stays the same, so that the result depends only on the source.

    Args:
        directory: Local directory of the TFDS dataset, which is changed.
        metadata: Metadata of the dataset.
        digests: First 8 bytes of the pixel digests that occurred with several classes.
        drop: Whether to remove the images.

    Returns:
        The metadata, with contradictions and new counts. Unchanged if there are none.
    """
    if not digests:
        return metadata
    groups = _find_groups(directory, metadata, digests)
    if not groups:
        return metadata
    if drop:
        for split in metadata.splits:
            _remove_records(directory, split, groups.keys())
        metadata = _subtract(metadata, groups)
    found = sorted(groups.values())
    contradictions = Contradictions(
        groups=len(found),
        images=sum(map(len, found)),
        dropped=drop,
        examples=tuple(
            tuple(LabeledImage(name=name, class_name=label) for _, name, label in group[:MAX_IMAGES])
            for group in found[:MAX_GROUPS]
        ),
    )
    return metadata.model_copy(update={"contradictions": contradictions})


def _find_groups(directory: Path, metadata: DatasetMetadata, digests: Set[bytes]) -> dict[str, _Group]:
    """Return the images of each pixel digest that really occurs with several classes, in a stable order."""
    groups: dict[str, _Group] = {}
    for split in sorted(metadata.splits):
        for shard in _shards(directory, split):
            for record in _read_records(shard):
                features = tf.train.Example.FromString(record).features.feature
                digest = features["sha256"].bytes_list.value[0].decode()
                if bytes.fromhex(digest[:16]) in digests:
                    name = features["name"].bytes_list.value[0].decode()
                    label = metadata.class_names[features["label"].int64_list.value[0]]
                    groups.setdefault(digest, []).append((split, name, label))
    groups = {digest: sorted(group) for digest, group in groups.items()}
    return {digest: group for digest, group in groups.items() if len({label for _, _, label in group}) > 1}


def _remove_records(directory: Path, split: str, digests: Set[str]) -> None:
    """Rewrite the shards of a split without some images, one at a time, to need little disk space."""
    lengths, removed_bytes = [], 0
    for shard in _shards(directory, split):
        part = shard.with_name(f"{shard.name}.part")
        length = 0
        with tf.io.TFRecordWriter(str(part)) as writer:
            for record in _read_records(shard):
                digest = tf.train.Example.FromString(record).features.feature["sha256"].bytes_list.value[0].decode()
                if digest in digests:
                    removed_bytes += len(record)
                else:
                    writer.write(record)
                    length += 1
        part.replace(shard)
        lengths.append(length)
    path = directory / _INFO_FILE
    info = json.loads(path.read_text("utf-8"))
    entry = next(entry for entry in info["splits"] if entry["name"] == split)
    entry["shardLengths"] = [str(length) for length in lengths]
    entry["numBytes"] = str(int(entry["numBytes"]) - removed_bytes)
    path.write_text(json.dumps(info, indent=2, sort_keys=True), "utf-8")


def _subtract(metadata: DatasetMetadata, groups: dict[str, _Group]) -> DatasetMetadata:
    splits = {split: dict(counts) for split, counts in metadata.splits.items()}
    for group in groups.values():
        for split, _, label in group:
            splits[split][label] -= 1
    splits = {split: {label: count for label, count in counts.items() if count} for split, counts in splits.items()}
    repeated = sum(len(group) - 1 for group in groups.values())
    removed = sum(map(len, groups.values()))
    return metadata.model_copy(
        update={
            "splits": splits,
            "images": metadata.images - removed,
            "duplicates": metadata.duplicates - repeated,
        }
    )


def _shards(directory: Path, split: str) -> list[Path]:
    return sorted(directory.glob(f"{TFDS_NAME}-{split}.tfrecord-*"))


def _read_records(shard: Path) -> Iterator[bytes]:
    with tf.device("CPU:0"):
        yield from tf.data.TFRecordDataset(str(shard)).as_numpy_iterator()
