"""`spec.dataset`: where the images come from and how they are split."""

from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from topwork.spec.messages import listed, shown
from topwork.spec.section import Meaning, Number, Part, Refusal, Whole, rule
from topwork.spec.slices import Slicing, parse_slices
from topwork.spec.uris import ArchiveUri, FolderUri, TableUri

Side = Annotated[Whole, Field(ge=16, le=2048)]
Sha256 = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-f]{64}$"), Meaning("64 hex digits in lower case, as sha256sum prints them")
]
TfdsName = Annotated[
    str,
    StringConstraints(
        pattern=r"^[a-z][a-z0-9_]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})?(:([0-9]+|\*)(\.([0-9]+|\*)){2})?$"
    ),
    Meaning("name[/config][:version], such as cats_vs_dogs or cats_vs_dogs:4.0.1"),
]
InnerFolder = Annotated[
    str,
    StringConstraints(pattern=r"^$|^[^/\\\x00-\x1f][^\\\x00-\x1f]*$", max_length=1024),
    Meaning("a relative path with forward slashes"),
]
Column = Annotated[str, StringConstraints(min_length=1, max_length=200), Meaning("the name of a column")]


class FolderSource(Part):
    """Images in folders that are named for their class: `<class>/<image>`."""

    uri: FolderUri = Field(description="S3 prefix (s3://bucket/prefix/) or local path that holds one folder a class.")


class ArchiveSource(Part):
    """An archive of class folders: zip, tar, tar.gz, tar.bz2 or tar.xz."""

    uri: ArchiveUri = Field(description="http(s) address, S3 object or local path of the archive.")
    root: InnerFolder = Field(default="", description="Folder inside the archive that holds one folder a class.")
    sha256: Sha256 | None = Field(default=None, description="SHA-256 of the archive, in lower-case hex; checked.")


class TableSource(Part):
    """A CSV or JSON-lines table that names an image and its class in each row."""

    uri: TableUri = Field(description="S3 object or local path of a .csv, .jsonl or .ndjson file.")
    image: Column = Field(default="image", description="Column with the image's address, relative to the table.")
    label: Column = Field(default="label", description="Column with the class name.")


class DatasetSource(Part):
    """Exactly one of tfds, folder, archive and table."""

    tfds: TfdsName | None = Field(default=None, description="TensorFlow Datasets name: name[/config][:version].")
    folder: FolderSource | None = Field(default=None, description="Folders named for their class.")
    archive: ArchiveSource | None = Field(default=None, description="An archive of class folders.")
    table: TableSource | None = Field(default=None, description="A table of images and classes.")


class PerClass(Part):
    """Exact counts of images of each class in each split."""

    train: Whole = Field(ge=1, description="Training images of each class.")
    validation: Whole = Field(default=0, ge=0, description="Validation images of each class.")
    test: Whole = Field(ge=1, description="Test images of each class.")


class Splits(Part):
    """Which part of the stored dataset trains, validates and tests: TFDS slicing, or counts a class."""

    train: Slicing | None = Field(default=None, description="Images that train, such as train[:40%].")
    validation: Slicing | None = Field(
        default=None, description="Images that early stopping and the best epoch go by, such as train[40%:50%]."
    )
    test: Slicing | None = Field(
        default=None, description="Images that the result is evaluated on, such as train[50%:60%]; else validation's."
    )
    per_class: PerClass | None = Field(default=None, description="Exact counts a class, instead of slices.")

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return self.validation is not None or (self.per_class is not None and self.per_class.validation > 0)


class Dataset(Part):
    """The images that the classifier learns from and is tested on."""

    source: DatasetSource = Field(description="Where the images come from.")
    splits: Splits = Field(description="Which images train, validate and test.")
    image_size: tuple[Side, Side] = Field(description="Height and width in pixels that every image is resized to.")
    on_corrupt_image: Literal["skip", "fail"] = Field(
        default="skip", description="What an image that does not decode does to the job."
    )
    max_rejected_ratio: Number = Field(
        default=0.2, ge=0.0, le=1.0, description="Share of rejected images above which the job fails."
    )
    on_missing_class: Literal["fail", "allow"] = Field(
        default="fail",
        description="What a class without an image in the validation or test split does to the job; one without a "
        "training image always fails it.",
    )


@rule(ArchiveSource)
def root_stays_inside_the_archive(archive: ArchiveSource) -> Iterator[Refusal]:
    """A path that climbs out of the archive names nothing in it."""
    if ".." in archive.root.split("/"):
        yield Refusal("root", f"{shown(archive.root)} climbs out of the archive. Take the .. out.")


@rule(TableSource)
def image_and_label_are_two_columns(table: TableSource) -> Iterator[Refusal]:
    """One column can't be both the picture and its class."""
    if table.image == table.label:
        yield Refusal(
            "label", f"{shown(table.label)} is spec.dataset.source.table.image too. Name the class's own column."
        )


@rule(DatasetSource)
def exactly_one_source(source: DatasetSource) -> Iterator[Refusal]:
    """A job has one dataset."""
    given = [kind for kind in DatasetSource.model_fields if getattr(source, kind) is not None]
    if len(given) != 1:
        found = f"{listed(given)} are given" if given else "none is given"
        yield Refusal("", f"{found}, exactly one of tfds, folder, archive and table is needed.")


@rule(Splits)
def either_slices_or_counts(splits: Splits) -> Iterator[Refusal]:
    """Both at once would say two things about the same images."""
    given = [name for name in ("train", "validation", "test") if getattr(splits, name) is not None]
    if splits.per_class and given:
        yield Refusal(
            "perClass",
            f"stands beside {listed(given)}. Give either counts per class or slices, and take the other out.",
        )


@rule(Splits)
def there_is_something_to_train_on(splits: Splits) -> Iterator[Refusal]:
    """Without training images nothing is learnt."""
    if not splits.per_class and splits.train is None:
        yield Refusal("train", "missing. Say which images train, such as train: train[:80%], or give perClass.")


@rule(Splits)
def there_is_something_to_evaluate_on(splits: Splits) -> Iterator[Refusal]:
    """A model of which nobody knows how good it is isn't published. Without a test split, validation serves."""
    if not splits.per_class and splits.test is None and splits.validation is None:
        yield Refusal("test", "missing. Say which images the result is evaluated on, such as test: train[80%:].")


@rule(Splits)
def splits_share_no_image(splits: Splits) -> Iterator[Refusal]:
    """An image that trained and is evaluated on makes the model look better than it is."""
    given = {name: text for name in ("train", "validation", "test") if (text := getattr(splits, name)) is not None}
    for (one, text), (other, other_text) in combinations(given.items(), 2):
        if any(a.surely_overlaps(b) for a in parse_slices(text) for b in parse_slices(other_text)):
            yield Refusal(
                other,
                f"{other_text} overlaps {one}: {text}, so the same images would be in both and the figures too good. "
                "Choose slices that share no image.",
            )
