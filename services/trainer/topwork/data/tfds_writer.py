"""Writes validated images as a TensorFlow Datasets (TFDS) dataset."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import tensorflow as tf
import tensorflow_datasets as tfds

from topwork.data.dataset_manifest import (
    ORIGINALS_DIRECTORY,
    TFDS_NAME,
    OriginalFile,
    RejectedImage,
    format_rejections,
)
from topwork.data.images.decode_pool import DecodePool
from topwork.data.images.decoding import is_decodable
from topwork.data.images.high_bit_depth import PixelValues
from topwork.data.images.image_validation import NO_LABEL, Rejection, ValidatedImage
from topwork.data.signatures import SIGNATURES_FILE
from topwork.data.sources import Source, SourceImage
from topwork.errors import DataError

MAX_ORIGINALS = 16
MAX_ORIGINAL_BYTES = 8 * 2**20
"""Largest size of a source file that is kept with the dataset; see `OriginalFile`."""


@dataclass
class DatasetStats:
    """Counts of the images that were processed so far.

    Attributes:
        splits: Number of stored images per class, by split.
        rejected: Rejected images.
        duplicates: Number of images with the same pixels as an earlier image.
        kinds: Number of stored images by the format and pixels of their source files.
        originals: Source files of different kinds, with their content.
        values: Pixel values of each image with more than 8 bits per channel.
        contradictory: First 8 bytes of the pixel digests that occurred with several classes.
    """

    splits: dict[str, Counter[str]] = field(default_factory=dict)
    rejected: list[RejectedImage] = field(default_factory=list)
    duplicates: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    originals: list[tuple[OriginalFile, bytes]] = field(default_factory=list)
    values: list[PixelValues] = field(default_factory=list)
    # 8 bytes per image. In a million images, the chance of a false duplicate is 1 in 37 million.
    _seen: dict[bytes, str] = field(default_factory=dict)
    contradictory: set[bytes] = field(default_factory=set)

    def add_stored(self, split: str, label: str, name: str, image: ValidatedImage) -> None:
        """Count a stored image, and keep its source file if it is the first one of its kind."""
        self.splits.setdefault(split, Counter())[label] += 1
        short = bytes.fromhex(image.sha256[:16])
        self.duplicates += short in self._seen
        if self._seen.setdefault(short, label) != label:
            self.contradictory.add(short)
        self.kinds[image.kind] += 1
        if image.values:
            self.values.append(image.values)
        content = image.encoded if image.original is None else image.original
        is_new = all(original.kind != image.kind for original, _ in self.originals)
        if is_new and len(self.originals) < MAX_ORIGINALS and len(content) <= MAX_ORIGINAL_BYTES:
            file = f"{ORIGINALS_DIRECTORY}/{len(self.originals):02}"
            original = OriginalFile(
                file=file, kind=image.kind, name=name, label=label, is_servable=is_decodable(content)
            )
            self.originals.append((original, content))

    def add_rejected(self, name: str, rejection: Rejection) -> None:
        """Record a rejected image and its reason."""
        self.rejected.append(RejectedImage(name=name, reason=rejection.reason, detail=rejection.detail))

    @property
    def images(self) -> int:
        """Number of stored images."""
        return sum(counts.total() for counts in self.splits.values())


class _DeterministicWriter(tfds.core.ExampleWriter):
    """Writes examples with a fixed feature order.

    Protobuf serializes maps in an order that differs between processes. Two concurrent pulls of the same source must
    write identical files, because either may upload them.
    """

    def write(self, path: Any, examples: Any) -> Any:
        return super().write(path, ((key, _sort_features(record)) for key, record in examples))


def _sort_features(record: bytes) -> bytes:
    data: bytes = tf.train.Example.FromString(record).SerializeToString(deterministic=True)
    return data


class StoredImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """TFDS builder of stored datasets, with the features image, label, name and sha256 (digest of the pixels)."""

    name = TFDS_NAME
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First."}

    def __init__(self, data_dir: Path, class_names: tuple[str, ...], splits: dict[str, Iterator[tuple[int, Any]]]):
        self._class_names = class_names
        self._generators = splits
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images validated and stored by topwork.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=self._class_names),
                    "name": tfds.features.Text(),
                    "sha256": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        return self._generators

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _DeterministicWriter(file_format=self.info.file_format)

    def _log_download_bytes(self) -> None:
        """Do nothing: TFDS prints to standard output here."""

    def _log_download_done(self) -> None:
        """Do nothing: TFDS prints to standard output here."""

    def _generate_examples(self) -> Iterator[tuple[int, Any]]:
        raise NotImplementedError  # _split_generators returns one generator per split


def write_tfds(
    source: Source, pool: DecodePool, directory: Path, advance: Callable[[], None]
) -> tuple[Path, DatasetStats]:
    """Validate every image of a source and write the valid ones as a TFDS dataset.

    The content of the files depends only on the content of the source.

    Args:
        source: Source of the images.
        pool: Pool that validates the images.
        directory: Empty local directory.
        advance: Called after each image.

    Returns:
        The directory of the dataset, inside `directory`, and the counts of stored and rejected images.

    Raises:
        DataError: If a split has no valid image, or the source returns a class that it did not list.
    """
    stats = DatasetStats()
    signatures = directory / SIGNATURES_FILE
    with signatures.open("wb") as file:
        sign = partial(_write_signature, file)
        splits = {split: _generate_examples(source, split, pool, stats, sign, advance) for split in source.splits()}
        tfds.disable_progress_bar()
        builder = StoredImages(directory / "building", source.class_names(), splits)
        builder.download_and_prepare(
            download_dir=directory / "downloads",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False, compute_stats="skip"),
        )
    signatures.replace(Path(builder.data_dir) / SIGNATURES_FILE)
    for original, content in stats.originals:
        path = Path(builder.data_dir) / original.file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return Path(builder.data_dir), stats


def _generate_examples(
    source: Source,
    split: str,
    pool: DecodePool,
    stats: DatasetStats,
    sign: Callable[[ValidatedImage], None],
    advance: Callable[[], None],
) -> Iterator[tuple[int, dict[str, Any]]]:
    labels = {name: index for index, name in enumerate(source.class_names())}
    # The position is the key: unique and stable. TFDS shuffles by the hash of the key.
    for key, (image, result) in enumerate(pool.validate_all(source.images(split), _read)):
        if isinstance(result, Rejection):
            stats.add_rejected(image.name, result)
        elif image.label not in labels:
            raise DataError(f"{image.name} has the class {image.label!r}, which did not exist when the pull started.")
        else:
            stats.add_stored(split, str(image.label), image.name, result)
            sign(result)
            yield (
                key,
                {
                    "image": result.encoded,
                    "label": labels[image.label],
                    "name": image.name,
                    "sha256": result.sha256,
                },
            )
        advance()
    if not stats.splits.get(split):
        raise DataError(f"No image of the split {split} is valid. {format_rejections(stats.rejected)}")


def _write_signature(file: BinaryIO, image: ValidatedImage) -> None:
    if image.signature:
        file.write(image.signature.pack(image.sha256))


def _read(image: SourceImage) -> bytes:
    if image.label is None:
        raise Rejection(NO_LABEL)
    return image.read()
