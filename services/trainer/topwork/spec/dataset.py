"""`spec.dataset`: where the images come from and how they are split."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictFloat, StrictInt, StringConstraints, Tag

from topwork.spec.classes import ClassesSetting, check_classes, classes_content
from topwork.spec.messages import format_value, join_words
from topwork.spec.spec_model import SpecModel, ValueDescription, Violation, rule
from topwork.spec.splits import Column, GroupBy, GroupColumn, Splits, SplitsSetting
from topwork.spec.uris import ArchiveUri, FolderUri, TableUri

SideLength = Annotated[StrictInt, Field(ge=16, le=2048)]
ImageFit = Literal["stretch", "crop", "pad"]
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


class Audit(SpecModel):
    """Checks of the stored dataset before training."""

    near_duplicates: Literal["fail", "warn", "off"] = Field(
        default="warn",
        description="How to handle images that are in two splits: with the same pixels, or compressed, resized, "
        "cropped to 90 %, mirrored or made brighter. warn reports them, and searches a sample of very large "
        "splits; fail searches all images, and stops the job before training if maxLeakRatio is exceeded; off does not "
        "search.",
    )
    label_issues: Literal["report", "off"] = Field(
        default="off",
        description="Whether to report images whose class is probably wrong. Computes the features of all images once.",
    )
    max_leak_ratio: StrictFloat = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Fraction of evaluated images with a duplicate in the train split, from 0 to 1, above which the "
        "job fails. Used with nearDuplicates: fail.",
    )


@rule(Audit)
def limit_of_leaks_is_used(audit: Audit) -> Iterator[Violation]:
    """A limit without effect would give false confidence."""
    found = audit.near_duplicates
    if audit.max_leak_ratio and found != "fail":
        fix = "Set nearDuplicates: fail, or remove maxLeakRatio."
        yield Violation("maxLeakRatio", f"is used only with nearDuplicates: fail, but that is {found}. {fix}")


class Dataset(SpecModel):
    """The images that train and evaluate the classifier."""

    source: DatasetSource = Field(description="Where the images come from.")
    classes: ClassesSetting | None = Field(
        default=None,
        description="Classes of the model, in the order of their labels: a list of classes of the source, in which "
        "{name: [class, …]} merges several to one, or {exclude: [class, …]} for all others in the order of the source. "
        "Images of other classes are left out. Unset: all classes of the source.",
    )
    splits: SplitsSetting = Field(
        description="Which images are used for training, validation and test. auto uses the splits of the source: "
        "directories such as train, val and test above those of the classes, the column table.split, or the splits of "
        "a TFDS dataset. A missing validation or test split is replaced by 10 % of each class of the train split."
    )
    image_size: tuple[SideLength, SideLength] = Field(
        description="Height and width in pixels to which every image is resized."
    )
    image_fit: ImageFit = Field(
        default="stretch",
        description="How images with another aspect ratio than imageSize are resized: stretch uses the whole image and "
        "does not preserve its aspect ratio, crop uses its central part, pad uses the whole image and adds black "
        "borders. Resizing is bilinear with antialiasing.",
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

    audit: Audit = Field(default=Audit(), description="Checks of the stored dataset before training.")

    @property
    def split_settings(self) -> Splits:
        """The setting of the splits in its full form."""
        return Splits.from_setting(self.splits)

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        return self.split_settings.has_validation

    @property
    def folds(self) -> int:
        """Number of folds of cross-validation; 0 without."""
        return self.split_settings.folds or 0

    @property
    def fold(self) -> int | None:
        """The only fold that is trained; None for all of them."""
        return self.split_settings.fold

    @property
    def group_by(self) -> GroupBy | None:
        """How images are grouped; None if they are not."""
        return self.split_settings.group_by

    @property
    def group_column(self) -> str | None:
        """Column of the table with the groups of images."""
        return self.group_by.column if isinstance(self.group_by, GroupColumn) else None

    @property
    def has_split_directories(self) -> bool:
        """Whether the directories of the classes are below those of the splits."""
        return self.split_settings.predefined and bool(self.source.folder or self.source.archive)


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

    `fail` stores the same images as `keep`; whether the job fails is decided for each job. With predefined splits, the
    classes are one level below the directories of the splits. The groups of a table are stored with the images, and
    only the images of the selected classes are stored.

    Example:
        >>> pull_settings(job.spec.dataset)
        {'onContradiction': 'keep'}
    """
    settings = {} if dataset.on_contradiction == "drop" else {"onContradiction": "keep"}
    settings |= {"splits": "auto"} if dataset.has_split_directories else {}
    settings |= {"groupBy": dataset.group_column} if dataset.group_column else {}
    return settings | ({} if dataset.classes is None else {"classes": classes_content(dataset.classes)})


@rule(Dataset)
def selected_classes_are_unambiguous(dataset: Dataset) -> Iterator[Violation]:
    """Each class of the source belongs to at most one class of the model, and names are unique."""
    if dataset.classes is not None:
        for path, message in check_classes(dataset.classes):
            yield Violation(f"classes.{path}".removesuffix("."), message)


@rule(Dataset)
def column_of_splits_is_used(dataset: Dataset) -> Iterator[Violation]:
    """A table defines splits in a column, and `auto` is the setting that uses it."""
    table, is_predefined = dataset.source.table, dataset.split_settings.predefined
    if table and table.split and not is_predefined:
        yield Violation("source.table.split", "is used only with spec.dataset.splits: auto. Set that, or remove split.")
    if table and not table.split and is_predefined:
        yield Violation(
            "splits",
            f"{'auto' if dataset.splits == 'auto' else 'predefined'} uses the splits of the source, but the table has "
            "none. Set spec.dataset.source.table.split to the column with the split of each image, or set fractions, "
            "such as {train: 0.8, validation: 0.1, test: 0.1}.",
        )


@rule(Dataset)
def column_of_groups_is_in_a_table(dataset: Dataset) -> Iterator[Violation]:
    """Only tables have columns."""
    if dataset.group_column and not dataset.source.table:
        yield Violation(
            "splits.groupBy.column", "needs spec.dataset.source.table. Use groupBy: folder or {regex: …} instead."
        )


@rule(Dataset)
def lists_name_files(dataset: Dataset) -> Iterator[Violation]:
    """The images of a TFDS dataset have no paths."""
    if dataset.source.tfds:
        for name in dataset.split_settings.lists:
            yield Violation(
                f"splits.{name}",
                "names images by their paths, but the images of a TFDS dataset have none. Use splits: auto, fractions "
                "or slices.",
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
