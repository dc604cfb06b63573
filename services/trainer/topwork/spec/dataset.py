"""`spec.dataset`: where the images come from and how they are split."""

from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictFloat, StrictInt, StringConstraints, Tag

from topwork.spec.messages import format_value, join_words
from topwork.spec.slices import Slicing, parse_slices
from topwork.spec.spec_model import SpecModel, ValueDescription, Violation, rule
from topwork.spec.uris import ArchiveUri, FolderUri, TableUri

SideLength = Annotated[StrictInt, Field(ge=16, le=2048)]
FiniteNumber = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Sha256 = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9a-f]{64}$"),
    ValueDescription("64 lowercase hex digits, as printed by sha256sum"),
]
TfdsName = Annotated[
    str,
    StringConstraints(
        pattern=r"^[a-z][a-z0-9_]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})?(:([0-9]+|\*)(\.([0-9]+|\*)){2})?$"
    ),
    ValueDescription("name[/config][:version], such as cats_vs_dogs or cats_vs_dogs:4.0.1"),
]
ArchivePath = Annotated[
    str,
    StringConstraints(pattern=r"^$|^[^/\\\x00-\x1f][^\\\x00-\x1f]*$", max_length=1024),
    ValueDescription("a relative path with forward slashes"),
]
NameEncoding = Literal[
    "utf-8", "cp437", "cp850", "cp852", "cp857", "cp866", "cp932", "cp949", "cp1250", "cp1251", "cp1252", "cp1253",
    "cp1254", "cp1255", "cp1256", "cp1258", "gbk", "gb18030", "big5", "euc-jp", "euc-kr", "koi8-r",
]  # fmt: skip
Column = Annotated[str, StringConstraints(min_length=1, max_length=200), ValueDescription("the name of a column")]


def _value_range_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<name>"
    return "<range>" if isinstance(value, list | tuple) else None


ValueRangeSetting = Annotated[
    Annotated[Literal["auto", "full"], Tag("<name>")] | Annotated[tuple[FiniteNumber, FiniteNumber], Tag("<range>")],
    Discriminator(_value_range_tag),
    ValueDescription("auto, full or [low, high]"),
]


class FolderSource(SpecModel):
    """Images in one directory per class: `<class>/<image>`."""

    uri: FolderUri = Field(
        description="S3 prefix (s3://bucket/prefix/) or local path that contains one directory per class."
    )


class ArchiveSource(SpecModel):
    """An archive with one directory per class: zip, tar, tar.gz, tar.bz2 or tar.xz."""

    uri: ArchiveUri = Field(description="HTTP(S) URL, S3 object or local path of the archive.")
    root: ArchivePath = Field(
        default="", description="Directory inside the archive that contains one directory per class."
    )
    sha256: Sha256 | None = Field(
        default=None,
        description="SHA-256 of the archive in lowercase hex. The pull stage fails if the download does not match.",
    )
    encoding: NameEncoding | None = Field(
        default=None,
        description="Encoding of file names that the archive does not declare as UTF-8. Unset: UTF-8 if all names are "
        "valid, otherwise a guess, which is logged with the class names.",
    )


class TableSource(SpecModel):
    """A CSV or JSON Lines table with one image and its class per row."""

    uri: TableUri = Field(description="S3 object or local path of a .csv, .jsonl or .ndjson file.")
    image: Column = Field(
        default="image", description="Column with the path or URI of the image, relative to the table."
    )
    label: Column = Field(default="label", description="Column with the class name.")


class DatasetSource(SpecModel):
    """The source of the images. Set exactly one of tfds, folder, archive and table."""

    tfds: TfdsName | None = Field(
        default=None, description="Dataset in TensorFlow Datasets, as name[/config][:version]."
    )
    folder: FolderSource | None = Field(
        default=None, description="A directory or S3 prefix with one directory per class."
    )
    archive: ArchiveSource | None = Field(default=None, description="An archive with one directory per class.")
    table: TableSource | None = Field(default=None, description="A table that lists images and their classes.")


class PerClass(SpecModel):
    """Exact number of images per class in each split."""

    train: StrictInt = Field(ge=1, description="Training images per class.")
    validation: StrictInt = Field(default=0, ge=0, description="Validation images per class.")
    test: StrictInt = Field(ge=1, description="Test images per class.")


class Splits(SpecModel):
    """Training, validation and test splits of the stored dataset, as TFDS slices or as counts per class."""

    train: Slicing | None = Field(default=None, description="Images used for training, such as train[:40%].")
    validation: Slicing | None = Field(
        default=None,
        description="Images used for early stopping and for selecting the best epoch, such as train[40%:50%].",
    )
    test: Slicing | None = Field(
        default=None,
        description="Images used to evaluate the final model, such as train[50%:60%]. Unset: the validation split.",
    )
    per_class: PerClass | None = Field(
        default=None, description="Exact number of images per class. Cannot be combined with slices."
    )

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        return self.validation is not None or (self.per_class is not None and self.per_class.validation > 0)


class Dataset(SpecModel):
    """The images that train and evaluate the classifier."""

    source: DatasetSource = Field(description="Where the images come from.")
    splits: Splits = Field(description="Which images are used for training, validation and test.")
    image_size: tuple[SideLength, SideLength] = Field(
        description="Height and width in pixels to which every image is resized."
    )
    value_range: ValueRangeSetting = Field(
        default="auto",
        description="Pixel values that become black and white, for images with more than 8 bits per channel: auto "
        "chooses one range for the whole dataset, such as 0 to 4095 for 12-bit images; full is 0 to 65535; [low, high] "
        "sets it. Images with 8 bits per channel are never changed.",
    )
    on_corrupt_image: Literal["skip", "fail"] = Field(
        default="skip",
        description="How to handle images that cannot be decoded: skip rejects the image, fail stops the job.",
    )
    max_rejected_ratio: StrictFloat = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="Fraction of rejected images, from 0 to 1, above which the job fails.",
    )
    on_contradiction: Literal["drop", "fail", "keep"] = Field(
        default="drop",
        description="How to handle images with identical pixels and different classes: drop removes all copies, fail "
        "stops the job, keep uses all copies, which limits the accuracy that can be reached. Dropped images count "
        "towards maxRejectedRatio.",
    )
    on_missing_class: Literal["fail", "allow"] = Field(
        default="fail",
        description="How to handle classes without images in the validation or test split. A class without training "
        "images always fails the job.",
    )


@rule(Dataset)
def value_range_is_ascending(dataset: Dataset) -> Iterator[Violation]:
    """The first value becomes black, the second white."""
    if not isinstance(dataset.value_range, str) and dataset.value_range[0] >= dataset.value_range[1]:
        low, high = dataset.value_range
        yield Violation(
            "valueRange",
            f"[{low:g}, {high:g}] is not a range. Expected [low, high] with low below high, such as [0, 4095].",
        )


def pull_settings(dataset: Dataset) -> dict[str, Any]:
    """Return the settings that change the content of the stored dataset, as far as they differ from their defaults.

    `fail` stores the same images as `keep`; whether the job fails is decided for each job.

    Example:
        >>> pull_settings(job.spec.dataset)
        {'onContradiction': 'keep'}
    """
    return {} if dataset.on_contradiction == "drop" else {"onContradiction": "keep"}


@rule(ArchiveSource)
def root_is_inside_the_archive(archive: ArchiveSource) -> Iterator[Violation]:
    """A path with `..` does not name a directory in the archive."""
    if ".." in archive.root.split("/"):
        yield Violation("root", f"{format_value(archive.root)} is outside the archive. Remove the .. segments.")


@rule(TableSource)
def image_and_label_are_different_columns(table: TableSource) -> Iterator[Violation]:
    """One column cannot contain both the image and its class."""
    if table.image == table.label:
        yield Violation(
            "label",
            f"{format_value(table.label)} is also set as spec.dataset.source.table.image. Name the column with the "
            "class.",
        )


@rule(DatasetSource)
def exactly_one_source(source: DatasetSource) -> Iterator[Violation]:
    """A job has exactly one dataset."""
    given = [kind for kind in DatasetSource.model_fields if getattr(source, kind) is not None]
    if len(given) != 1:
        found = f"{join_words(given)} are set" if given else "none is set"
        yield Violation("", f"{found}, but exactly one of tfds, folder, archive and table is required.")


@rule(Splits)
def slices_or_counts(splits: Splits) -> Iterator[Violation]:
    """Slices and counts per class would define the same splits twice."""
    given = [name for name in ("train", "validation", "test") if getattr(splits, name) is not None]
    if splits.per_class and given:
        yield Violation(
            "perClass",
            f"cannot be combined with {join_words(given)}. Use either counts per class or slices.",
        )


@rule(Splits)
def training_split_is_set(splits: Splits) -> Iterator[Violation]:
    """Training needs a training split."""
    if not splits.per_class and splits.train is None:
        yield Violation("train", "is required. Set a slice, such as train: train[:80%], or use perClass.")


@rule(Splits)
def evaluation_split_is_set(splits: Splits) -> Iterator[Violation]:
    """Only an evaluated model is published. Without a test split, the validation split is used."""
    if not splits.per_class and splits.test is None and splits.validation is None:
        yield Violation("test", "is required if there is no validation split. Set a slice, such as test: train[80%:].")


@rule(Splits)
def splits_do_not_overlap(splits: Splits) -> Iterator[Violation]:
    """Evaluating on training images overestimates the quality of the model."""
    given = {
        name: first_text
        for name in ("train", "validation", "test")
        if (first_text := getattr(splits, name)) is not None
    }
    for (first, first_text), (second, second_text) in combinations(given.items(), 2):
        if any(
            left.definitely_overlaps(right) for left in parse_slices(first_text) for right in parse_slices(second_text)
        ):
            yield Violation(
                second,
                f"{second_text} overlaps {first}: {first_text}. Shared images make the metrics too optimistic. "
                "Choose slices that do not overlap.",
            )
