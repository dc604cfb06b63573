"""Writes proved images as a TensorFlow Datasets dataset."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from topwork.data.dataset_manifest import TFDS_NAME, RejectedImage, shown_rejections
from topwork.data.decode_pool import Provers
from topwork.data.image_validation import NO_LABEL, Rejection
from topwork.data.sources import Item, Source
from topwork.errors import DataError


def _serialized(serializer: tfds.core.ExampleSerializer, example: dict[str, Any]) -> bytes:
    data: bytes = serializer.get_tf_example(example).SerializeToString(deterministic=True)
    return data


# protobuf orders the features of an example anew in each process: two that pull at once must write the same bytes.
tfds.core.ExampleSerializer.serialize_example = _serialized


@dataclass
class Tally:
    """What became of the images of a source so far.

    Attributes:
        splits: Images stored of each class, by split.
        rejected: Images left out.
        duplicates: Images whose pixels were stored before.
    """

    splits: dict[str, Counter[str]] = field(default_factory=dict)
    rejected: list[RejectedImage] = field(default_factory=list)
    duplicates: int = 0
    # 8 bytes an image: among a million images one pair in 37 million is mistaken for a duplicate.
    _seen: set[bytes] = field(default_factory=set)

    def store(self, split: str, label: str, sha256: str) -> None:
        """Count an image that is stored."""
        self.splits.setdefault(split, Counter())[label] += 1
        short = bytes.fromhex(sha256[:16])
        self.duplicates += short in self._seen
        self._seen.add(short)

    def reject(self, name: str, rejection: Rejection) -> None:
        """Keep an image that is left out, with its reason."""
        self.rejected.append(RejectedImage(name=name, reason=rejection.reason, detail=rejection.detail))

    @property
    def images(self) -> int:
        """Images stored."""
        return sum(counts.total() for counts in self.splits.values())


class StoredImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The TFDS dataset that is stored: image, label, name and digest of the pixels."""

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
            description="Images that topwork proved and stored.",
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

    def _log_download_bytes(self) -> None:
        """Leave standard output alone: TFDS prints there."""

    def _log_download_done(self) -> None:
        """Leave standard output alone: TFDS prints there."""

    def _generate_examples(self) -> Iterator[tuple[int, Any]]:
        raise NotImplementedError  # every split has its generator


def write_tfds(source: Source, provers: Provers, folder: Path, advance: Callable[[], None]) -> tuple[Path, Tally]:
    """Prove every image of a source and write those that decode.

    The files depend on the content of the source alone, not on when or where they are written.

    Args:
        source: Where the images come from.
        provers: Who proves them.
        folder: Empty local folder.
        advance: Called after each image.

    Returns:
        The folder inside `folder` that holds the dataset, and the tally.

    Raises:
        DataError: If not one image of a split decodes, or the source holds a class that it did not name.
    """
    tally = Tally()
    splits = {split: _examples(source, split, provers, tally, advance) for split in source.splits()}
    tfds.disable_progress_bar()
    builder = StoredImages(folder / "building", source.class_names(), splits)
    builder.download_and_prepare(
        download_dir=folder / "downloads",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, compute_stats="skip"),
    )
    return Path(builder.data_dir), tally


def _examples(
    source: Source, split: str, provers: Provers, tally: Tally, advance: Callable[[], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    labels = {name: index for index, name in enumerate(source.class_names())}
    # The position is the key: unique, stable, and TFDS shuffles by its hash.
    for key, (item, outcome) in enumerate(provers.each(source.items(split), _read)):
        if isinstance(outcome, Rejection):
            tally.reject(item.name, outcome)
        elif item.label not in labels:
            raise DataError(f"{item.name} is of the class {item.label!r}, which was not there when the pull began.")
        else:
            tally.store(split, str(item.label), outcome.sha256)
            yield (
                key,
                {
                    "image": outcome.encoded,
                    "label": labels[item.label],
                    "name": item.name,
                    "sha256": outcome.sha256,
                },
            )
        advance()
    if not tally.splits.get(split):
        raise DataError(f"Not one image of the split {split} can be used. {shown_rejections(tally.rejected)}")


def _read(item: Item) -> bytes:
    if item.label is None:
        raise Rejection(NO_LABEL)
    return item.read()
