"""The images on which a version was evaluated, stored with it so that later versions can be evaluated on the same ones.

They do not depend on the stored dataset, which may be deleted, nor on the rules by which splits are selected.
"""

import csv
import gzip
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from topwork.artifacts import read_manifest
from topwork.clients.s3.storage import Storage
from topwork.data.splits.inputs import EvaluatedImage, PinnedTest
from topwork.errors import DamagedError, DataError
from topwork.registry import versions

if TYPE_CHECKING:
    from topwork.data.local_dataset import Split

FILE = "evaluated-images.csv.gz"
"""Name of the file in a version: pixel digest, class and name of each image, as CSV without a header."""


def write_evaluated_images(images: Iterable[EvaluatedImage], directory: Path) -> None:
    """Write the images into the directory of a version. The same images give the same bytes."""
    with (
        (directory / FILE).open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as compressed,
        io.TextIOWrapper(compressed, "utf-8", newline="") as text,
    ):
        csv.writer(text).writerows(images)


def identify_images(split: "Split", class_names: Sequence[str]) -> tuple[EvaluatedImage, ...]:
    """Identify the images of a split by their pixels, class and name.

    Args:
        split: The split.
        class_names: Name of each class, in label order.

    Returns:
        One entry per image, in the order of the split.
    """
    rows = zip(split.digests.tolist(), split.labels.tolist(), split.names, strict=True)
    return tuple(EvaluatedImage(f"{digest:016x}", class_names[label], name) for digest, label, name in rows)


def read_evaluated_images(storage: Storage, name: str, number: int) -> tuple[EvaluatedImage, ...] | None:
    """Read the images on which a version was evaluated.

    Args:
        storage: Storage of the models.
        name: Name of the model.
        number: Version number.

    Returns:
        The images; None if an older topwork published the version, which did not store them.

    Raises:
        UnavailableError: If storage cannot be reached, or the file is damaged.
    """
    prefix = versions.version_prefix(name, number)
    manifest = read_manifest(storage, prefix)
    if manifest is None or FILE not in manifest.files:
        return None
    content = storage.read(manifest.key_of(prefix, FILE)) or b""
    if hashlib.sha256(content).hexdigest() != manifest.files[FILE].sha256:
        raise DamagedError(f"{storage.uri_of(manifest.key_of(prefix, FILE))} does not match its manifest. Try again.")
    rows = csv.reader(io.StringIO(gzip.decompress(content).decode(), newline=""))
    return tuple(EvaluatedImage(*row) for row in rows)


def read_pinned_test(storage: Storage, name: str, number: int) -> PinnedTest:
    """Read the test set of a published version.

    Args:
        storage: Storage of the models.
        name: Name of the model.
        number: Version number.

    Returns:
        The test set.

    Raises:
        DataError: If there is no such version, or it was not evaluated on a test split.
        UnavailableError: If storage cannot be reached, or the file is damaged.
    """
    key = f"spec.dataset.splits.pinTest is {number}, but"
    version = versions.read_version(storage, name, number)
    if version is None:
        published = [
            str(known) for known, is_published in versions.list_versions(storage, name).items() if is_published
        ]
        raise DataError(
            f"{key} {storage.uri} has no version {number} of the model {name}. Published versions: "
            f"{', '.join(published) or 'none'}."
        )
    if version.split != "test":
        raise DataError(
            f"{key} version {number} of {name} has no test split: its metrics are those of {version.split}. Pin a "
            "version with a test split, or set spec.dataset.splits.test."
        )
    images = read_evaluated_images(storage, name, number)
    if images is None:
        raise DataError(
            f"{key} version {number} of {name} was published by an older topwork, which did not store its test images. "
            "Publish the model again with this version of topwork, from the same spec without pinTest, and pin the new "
            "version."
        )
    return PinnedTest(number, images)
