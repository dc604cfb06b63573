"""`spec.dataset`: where the images come from and how they are split."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from topwork.spec.part import Part

Side = Annotated[int, Field(ge=16, le=2048)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class FolderSource(Part):
    """Images in folders that are named for their class: `<class>/<image>`."""

    uri: str = Field(description="S3 prefix (s3://bucket/prefix/) or local path that holds one folder a class.")


class ArchiveSource(Part):
    """An archive of class folders: zip, tar, tar.gz, tar.bz2 or tar.xz."""

    uri: str = Field(description="http(s) address, S3 object or local path of the archive.")
    root: str = Field(default="", description="Folder inside the archive that holds one folder a class.")
    sha256: Sha256 | None = Field(default=None, description="SHA-256 of the archive, in lower-case hex; checked.")


class TableSource(Part):
    """A CSV or JSON-lines table that names an image and its class in each row."""

    uri: str = Field(description="S3 object or local path of a .csv, .jsonl or .ndjson file.")
    image: str = Field(default="image", description="Column with the image's address, relative to the table.")
    label: str = Field(default="label", description="Column with the class name.")


class DatasetSource(Part):
    """Exactly one of tfds, folder, archive and table."""

    tfds: str | None = Field(default=None, description="TensorFlow Datasets name: name[/config][:version].")
    folder: FolderSource | None = Field(default=None, description="Folders named for their class.")
    archive: ArchiveSource | None = Field(default=None, description="An archive of class folders.")
    table: TableSource | None = Field(default=None, description="A table of images and classes.")


class PerClass(Part):
    """Exact counts of images of each class in each split."""

    train: int = Field(ge=1, description="Training images of each class.")
    validation: int = Field(default=0, ge=0, description="Validation images of each class.")
    test: int = Field(ge=1, description="Test images of each class.")


class Splits(Part):
    """Which part of the stored dataset trains, validates and tests: TFDS slicing, or counts a class."""

    train: str | None = Field(default=None, description="TFDS slicing, such as train[:40%].")
    validation: str | None = Field(default=None, description="TFDS slicing, such as train[40%:50%].")
    test: str | None = Field(default=None, description="TFDS slicing, such as train[50%:60%].")
    per_class: PerClass | None = Field(default=None, description="Exact counts a class, instead of slices.")


class Dataset(Part):
    """The images that the classifier learns from and is tested on."""

    source: DatasetSource = Field(description="Where the images come from.")
    splits: Splits = Field(description="Which images train, validate and test.")
    image_size: tuple[Side, Side] = Field(description="Height and width in pixels that every image is resized to.")
    on_corrupt_image: Literal["skip", "fail"] = Field(
        default="skip", description="What an image that does not decode does to the job."
    )
    max_rejected_ratio: float = Field(
        default=0.2, ge=0.0, le=1.0, description="Share of rejected images above which the job fails."
    )
