"""Signatures of the images of a downloaded dataset: written by the pull, or computed here for older datasets."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from topwork.data.images.decode_pool import DecodePool
from topwork.data.images.image_validation import Rejection
from topwork.data.images.signature import RECORD, THUMBNAIL_PIXELS
from topwork.data.record_index import RecordIndex
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

SIGNATURES_FILE = "signatures-1.bin"
"""Signatures in the directory of a stored dataset, one record per image. Increment the number when they change."""

_DTYPE = np.dtype(
    [
        ("digest", "<u8"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("sharpness", "<f4"),
        ("thumbnail", "u1", (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)),
    ]
)


@dataclass(frozen=True)
class Thumbnails:
    """Thumbnails of images, read from the file when they are used: a million takes 1 GB.

    Attributes:
        records: Structured array, mapped from a file.
        rows: Record of each image, int64 (n,).
    """

    records: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def __getitem__(self, selection: Any) -> npt.NDArray[np.uint8]:
        """Read the thumbnails that a slice or an array of indices selects, uint8 (k, 32, 32)."""
        return np.asarray(self.records["thumbnail"][self.rows[selection]])

    def select(self, indices: npt.NDArray[np.int64]) -> "Thumbnails":
        """Return some of the thumbnails, by their indices, int64 (k,)."""
        return Thumbnails(self.records, self.rows[indices])


@dataclass(frozen=True)
class Signatures:
    """Signatures of images.

    Attributes:
        thumbnails: Gray thumbnails.
        width: Width in pixels, (n,).
        height: Height in pixels, (n,).
        sharpness: Variance of the Laplace operator, (n,).
    """

    thumbnails: Thumbnails
    width: npt.NDArray[np.uint32]
    height: npt.NDArray[np.uint32]
    sharpness: npt.NDArray[np.float32]


@dataclass(frozen=True)
class SignatureFile:
    """Signatures of all images of a dataset, found by their pixel digest: equal pixels have equal signatures.

    Attributes:
        records: Structured array, mapped from a file.
        order: Order of the records by digest, int64.
    """

    records: npt.NDArray[Any]
    order: npt.NDArray[np.int64]

    def find(self, digests: npt.NDArray[np.uint64]) -> Signatures:
        """Find the signatures of images.

        Args:
            digests: First 8 bytes of the pixel digest of each image, uint64 (n,).

        Raises:
            KeyError: If an image has no signature.
        """
        known = self.records["digest"][self.order]
        found = np.minimum(np.searchsorted(known, digests), len(known) - 1)
        if not np.array_equal(known[found], digests):
            raise KeyError("an image has no signature")
        rows = self.order[found]
        fields = {name: self.records[name][rows] for name in ("width", "height", "sharpness")}
        return Signatures(Thumbnails(self.records, rows), **fields)


def open_signatures(directory: Path, records: RecordIndex, workspace: Workspace) -> SignatureFile:
    """Open the signatures of a downloaded dataset. Computes them if the pull did not.

    Args:
        directory: Directory of the dataset on scratch.
        records: Index of its images.
        workspace: Workspace that displays the progress.

    Returns:
        The signatures.
    """
    path = directory / SIGNATURES_FILE
    if not path.exists():
        _compute(path, records, workspace)
    mapped = np.memmap(path, _DTYPE, "r")
    return SignatureFile(mapped, np.argsort(mapped["digest"], kind="stable"))


def _compute(path: Path, records: RecordIndex, workspace: Workspace) -> None:
    size = len(records.labels)
    log.info("signatures are computed once more, because an older version of topwork stored the dataset", images=size)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with workspace.track("audit: signatures", size) as tracker, DecodePool() as pool, part.open("wb") as file:
        for signature in _sign_all(records, pool):
            file.write(signature)
            tracker.advance(1)
    part.replace(path)


def _sign_all(records: RecordIndex, pool: DecodePool) -> Iterator[bytes]:
    for position, result in pool.validate_all(range(len(records.labels)), records.read_image):
        if isinstance(result, Rejection) or result.signature is None:
            raise ValueError(f"the stored image {records.image_names(np.array([position]))[0]} cannot be decoded")
        yield RECORD.pack(int(records.digests[position]), *vars(result.signature).values())
