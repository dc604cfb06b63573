"""Free disk space: checks it before a large write, and reports a full disk clearly.

A full disk results in exit code 75: another node, or the same node later, may have free space. An exhausted quota or an
exceeded limit of the spec results in exit code 2: retrying does not help.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from topwork.errors import SettingError, TopworkError, UnavailableError

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
# Reserve for logs, indexes and library files.
MARGIN_BYTES = 64 << 20
_FULL_MESSAGE = "No space left on device"
_QUOTA_MESSAGE = "Disk quota exceeded"


def format_bytes(size: float) -> str:
    """Format a number of bytes with one decimal and its unit.

    Example:
        ```python
        format_bytes(1610612736)  # "1.5 GiB"
        ```
    """
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{size:.0f} B"


def disk_full_error(error: BaseException, directory: Path | None = None) -> TopworkError | None:
    """Convert an exception that a full disk caused in any library to an error for the user.

    Args:
        error: The exception. Its causes are inspected too.
        directory: Directory of the failed write, if known.

    Returns:
        The error for the user; None if the disk was not full.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TopworkError):
        if kind := _error_type(cause):
            return _create_error(cause, kind, directory)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


@contextmanager
def report_full_disk(directory: Path) -> Iterator[None]:
    """Convert exceptions that a full disk causes in the block to errors for the user.

    Args:
        directory: Directory that the block writes to.

    Raises:
        UnavailableError: If the disk is full.
        SettingError: If the disk quota is exhausted.
    """
    try:
        yield
    except Exception as error:
        if full := disk_full_error(error, directory):
            raise full from error
        raise


def directory_bytes(directory: Path) -> int:
    """Return the total size of the files in a directory; 0 if it does not exist."""
    size = 0
    for path in directory.rglob("*"):
        with suppress(OSError):  # deleted during the traversal
            size += path.lstat().st_size if not path.is_dir() else 0
    return size


def require_free_space(
    directory: Path, needed: int, operation: str, limit: int | None = None, *, existing: int = 0
) -> None:
    """Check that the disk has space for an operation before it starts.

    Args:
        directory: Existing directory that the operation writes to.
        needed: Required space in bytes, as far as known.
        operation: Subject of the error message, such as "Pulling s3://…".
        limit: Size limit of the volume in bytes (`spec.compute.scratch`), beyond which the cluster evicts the pod.
        existing: Part of `needed` that is on the disk already, in files that the operation reuses or replaces.

    Raises:
        SettingError: If the operation needs more space than the volume limit.
        UnavailableError: If the disk has too little free space.
    """
    if limit is not None and needed > limit:
        raise SettingError(
            f"{operation} needs about {format_bytes(needed)} of the scratch volume, but spec.compute.scratch is "
            f"{format_bytes(limit)}. Increase it: the cluster evicts a pod whose volume exceeds its limit."
        )
    free = shutil.disk_usage(directory).free
    if needed + MARGIN_BYTES > free + existing:
        raise UnavailableError(
            f"{operation} needs about {format_bytes(needed)}, but {directory} has {format_bytes(free)} free. Free "
            "space there, or use a larger disk or another node, then start again."
        )


def _error_type(error: BaseException) -> type[TopworkError] | None:
    number, message = getattr(error, "errno", None), str(error)
    # TensorFlow and HDF5 report it in the message only.
    has_message = isinstance(error, OSError) or type(error).__module__.startswith(("tensorflow", "h5py"))
    if number == errno.ENOSPC or (has_message and _FULL_MESSAGE in message):
        return UnavailableError
    if number == errno.EDQUOT or (has_message and _QUOTA_MESSAGE in message):
        return SettingError
    return None


def _create_error(error: BaseException, kind: type[TopworkError], directory: Path | None) -> TopworkError:
    filename = getattr(error, "filename", None)
    location = str(directory or filename or "the disk that topwork writes to")
    free = ""
    if directory and directory.exists():
        usage = shutil.disk_usage(directory)
        free = f" ({format_bytes(usage.free)} of {format_bytes(usage.total)} free)"
    file = f" while writing {filename}" if directory and filename and str(filename) != location else ""
    problem = "The disk quota is exhausted" if kind is SettingError else "No disk space is left"
    return kind(
        f"{problem} in {location}{free}{file}. Free space there, or use a larger disk (in a cluster, "
        "spec.compute.scratch or another node), then start again: stored data is kept."
    )
