"""`spec.dataset`: where the images come from and how they are split."""

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, StrictBool, StrictFloat, StrictInt, StringConstraints, Tag

from topwork.spec.messages import format_value, join_words
from topwork.spec.slices import Slicing, parse_slices
from topwork.spec.spec_model import SpecModel, ValueDescription, Violation, rule
from topwork.spec.uris import ArchiveUri, FolderUri, TableUri, invalid_value

SPLIT_NAMES = ("train", "validation", "test")

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
Fraction = Annotated[
    StrictFloat, Field(gt=0.0, lt=1.0), ValueDescription("a fraction above 0 and below 1, such as 0.8")
]
Column = Annotated[str, StringConstraints(min_length=1, max_length=200), ValueDescription("the name of a column")]


def _validate_regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise invalid_value(f"{format_value(text)} is not a regular expression: {error}") from error
    return text


Regex = Annotated[
    str,
    StringConstraints(min_length=1, max_length=1000),
    AfterValidator(_validate_regex),
    ValueDescription("a regular expression"),
]


def _value_range_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<name>"
    return "<range>" if isinstance(value, list | tuple) else None


ValueRangeSetting = Annotated[
    Annotated[Literal["auto", "full"], Tag("<name>")] | Annotated[tuple[FiniteNumber, FiniteNumber], Tag("<range>")],
    Discriminator(_value_range_tag),
    ValueDescription("auto, full or [low, high]"),
]


def _share_tag(value: object) -> str:
    return "<fraction>" if isinstance(value, int | float) and not isinstance(value, bool) else "<slice>"


Share = Annotated[
    Annotated[Fraction, Tag("<fraction>")] | Annotated[Slicing, Tag("<slice>")],
    Discriminator(_share_tag),
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
    split: Column | None = Field(
        default=None, description="Column with the split of each image: train, validation or test. Needs splits: auto."
    )


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


class GroupColumn(SpecModel):
    """Groups images by a column of the table."""

    column: Column = Field(description="Column with the group of each image.")


class GroupRegex(SpecModel):
    """Groups images by their names."""

    regex: Regex = Field(
        description="Regular expression (Python) that is searched in the name of each image, its path in the source. "
        "The group is its first capture group, or the whole match."
    )


GROUP_MODELS: dict[str, type[SpecModel]] = {"column": GroupColumn, "regex": GroupRegex}


def _group_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<folder>"
    for key, model in GROUP_MODELS.items():
        if isinstance(value, model) or (isinstance(value, dict) and key in value):
            return f"<{key}>"
    return None


GroupBy = Annotated[
    Annotated[Literal["folder"], Tag("<folder>")]
    | Annotated[GroupColumn, Tag("<column>")]
    | Annotated[GroupRegex, Tag("<regex>")],
    Discriminator(_group_tag),
    ValueDescription("folder, {column: name} or {regex: …}"),
]


class PerClass(SpecModel):
    """Exact number of images per class in each split."""

    train: StrictInt = Field(ge=1, description="Training images per class.")
    validation: StrictInt = Field(default=0, ge=0, description="Validation images per class.")
    test: StrictInt = Field(ge=1, description="Test images per class.")


class Splits(SpecModel):
    """Training, validation and test splits of the stored dataset: fractions, TFDS slices or counts per class."""

    train: Share | None = Field(
        default=None, description="Images used for training: a fraction of all images, such as 0.8, or a TFDS slice."
    )
    validation: Share | None = Field(
        default=None,
        description="Images used for early stopping and for selecting the best epoch, such as 0.1 or train[40%:50%].",
    )
    test: Share | None = Field(
        default=None,
        description="Images used to evaluate the final model, such as 0.1 or train[50%:60%]. Unset: the validation "
        "split.",
    )
    stratify: StrictBool = Field(
        default=True,
        description="Whether fractions apply to each class, so that every split contains every class in the same "
        "proportion. Slices are never stratified, counts per class always.",
    )
    group_by: GroupBy | None = Field(
        default=None,
        description="Keeps images of a group, such as a patient, a camera or a series, in one split: folder (the "
        "directory that contains the image, below its class), {column: name} of the table, or {regex: …}. With "
        "fractions only, which are then approximate.",
    )
    per_class: PerClass | None = Field(
        default=None, description="Exact number of images per class. Cannot be combined with fractions or slices."
    )

    @property
    def shares(self) -> dict[str, float | str]:
        """The fraction or slice of each split that is set."""
        return {name: share for name in SPLIT_NAMES if (share := getattr(self, name)) is not None}

    @property
    def fractions(self) -> dict[str, float]:
        """The fraction of each split that is set; empty if the splits are slices or counts per class."""
        return {name: share for name, share in self.shares.items() if isinstance(share, float)}

    @property
    def slices(self) -> dict[str, str]:
        """The slice of each split that is set; empty if the splits are fractions or counts per class."""
        return {name: share for name, share in self.shares.items() if isinstance(share, str)}

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        return self.validation is not None or (self.per_class is not None and self.per_class.validation > 0)


def _splits_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<name>"
    return "<mapping>" if isinstance(value, dict | Splits) else None


SplitsSetting = Annotated[
    Annotated[Literal["auto"], Tag("<name>")] | Annotated[Splits, Tag("<mapping>")],
    Discriminator(_splits_tag),
]


class Dataset(SpecModel):
    """The images that train and evaluate the classifier."""

    source: DatasetSource = Field(description="Where the images come from.")
    splits: SplitsSetting = Field(
        description="Which images are used for training, validation and test. auto uses the splits of the source: "
        "directories such as train, val and test above those of the classes, the column table.split, or the splits of "
        "a TFDS dataset. A missing validation or test split is replaced by 10 % of each class of the train split."
    )
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

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        return self.splits == "auto" or self.splits.has_validation

    @property
    def group_column(self) -> str | None:
        """Column of the table with the groups of images."""
        group_by = None if self.splits == "auto" else self.splits.group_by
        return group_by.column if isinstance(group_by, GroupColumn) else None

    @property
    def has_split_directories(self) -> bool:
        """Whether the directories of the classes are below those of the splits."""
        return self.splits == "auto" and bool(self.source.folder or self.source.archive)


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

    `fail` stores the same images as `keep`; whether the job fails is decided for each job. With `splits: auto`, the
    classes are one level below the directories of the splits. The groups of a table are stored with the images.

    Example:
        >>> pull_settings(job.spec.dataset)
        {'onContradiction': 'keep'}
    """
    settings = {} if dataset.on_contradiction == "drop" else {"onContradiction": "keep"}
    settings |= {"splits": "auto"} if dataset.has_split_directories else {}
    return settings | ({"groupBy": dataset.group_column} if dataset.group_column else {})


@rule(Dataset)
def column_of_splits_is_used(dataset: Dataset) -> Iterator[Violation]:
    """A table defines splits in a column, and `auto` is the setting that uses it."""
    table, is_auto = dataset.source.table, dataset.splits == "auto"
    if table and table.split and not is_auto:
        yield Violation("source.table.split", "is used only with spec.dataset.splits: auto. Set that, or remove split.")
    if table and not table.split and is_auto:
        yield Violation(
            "splits",
            "auto uses the splits of the source, but the table has none. Set spec.dataset.source.table.split to the "
            "column with the split of each image, or set fractions, such as {train: 0.8, validation: 0.1, test: 0.1}.",
        )


@rule(Dataset)
def column_of_groups_is_in_a_table(dataset: Dataset) -> Iterator[Violation]:
    """Only tables have columns."""
    if dataset.group_column and not dataset.source.table:
        yield Violation(
            "splits.groupBy.column", "needs spec.dataset.source.table. Use groupBy: folder or {regex: …} instead."
        )


@rule(ArchiveSource)
def root_is_inside_the_archive(archive: ArchiveSource) -> Iterator[Violation]:
    """A path with `..` does not name a directory in the archive."""
    if ".." in archive.root.split("/"):
        yield Violation("root", f"{format_value(archive.root)} is outside the archive. Remove the .. segments.")


@rule(TableSource)
def columns_are_different(table: TableSource) -> Iterator[Violation]:
    """One column cannot contain both the image and its class or split."""
    for name in ("image", "label"):
        if table.split == getattr(table, name):
            yield Violation(
                "split",
                f"{format_value(table.split)} is also set as spec.dataset.source.table.{name}. Name the column with "
                "the split.",
            )
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
def one_kind_of_splits(splits: Splits) -> Iterator[Violation]:
    """Fractions, slices and counts per class would define the same splits twice."""
    if splits.per_class and splits.shares:
        yield Violation(
            "perClass",
            f"cannot be combined with {join_words(list(splits.shares))}. Use either counts per class, fractions or "
            "slices.",
        )
    if splits.fractions and splits.slices:
        (fraction, value), (slice_, text) = next(iter(splits.fractions.items())), next(iter(splits.slices.items()))
        yield Violation(
            slice_,
            f"{text} is a slice, but {fraction} is the fraction {value:g} of all images. Use only fractions or only "
            "slices.",
        )


@rule(Splits)
def training_split_is_set(splits: Splits) -> Iterator[Violation]:
    """Training needs a training split."""
    if not splits.per_class and splits.train is None:
        yield Violation("train", "is required. Set a fraction, such as train: 0.8, or use perClass.")


@rule(Splits)
def evaluation_split_is_set(splits: Splits) -> Iterator[Violation]:
    """Only an evaluated model is published. Without a test split, the validation split is used."""
    if not splits.per_class and splits.test is None and splits.validation is None:
        example = "train[80%:]" if splits.slices else "0.1"
        yield Violation("test", f"is required if there is no validation split. Set it, such as test: {example}.")


@rule(Splits)
def fractions_are_at_most_all_images(splits: Splits) -> Iterator[Violation]:
    """Each image belongs to one split."""
    total = sum(splits.fractions.values())
    if total > 1 + 1e-9:
        given = " + ".join(f"{value:g}" for value in splits.fractions.values())
        yield Violation("train", f"{given} is {total:g}, but the fractions of all splits must add up to at most 1.")


@rule(Splits)
def options_of_fractions(splits: Splits) -> Iterator[Violation]:
    """Slices and counts per class are taken without regard to groups, and are always or never stratified."""
    given = {"stratify": not splits.stratify, "groupBy": splits.group_by is not None}
    for key in (key for key, is_given in given.items() if is_given and not splits.fractions):
        yield Violation(key, "applies only to fractions, such as train: 0.8. Remove it, or use fractions.")


@rule(Splits)
def splits_do_not_overlap(splits: Splits) -> Iterator[Violation]:
    """Evaluating on training images overestimates the quality of the model."""
    for (first, first_text), (second, second_text) in combinations(splits.slices.items(), 2):
        if any(
            left.definitely_overlaps(right) for left in parse_slices(first_text) for right in parse_slices(second_text)
        ):
            yield Violation(
                second,
                f"{second_text} overlaps {first}: {first_text}. Shared images make the metrics too optimistic. "
                "Choose slices that do not overlap.",
            )
