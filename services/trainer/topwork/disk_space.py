"""Room on a local disk: asked for before it is taken, and told in a sentence where it ran out.

A disk that is full ends with 75: in a cluster it is the node's, and another node, or this one later, has room. A quota
or a limit of the spec ends with 2: no other try changes it.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topwork.errors import SettingError, TopworkError, UnavailableError

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
# Left for everything that nobody counts: logs, indices, files of libraries.
MARGIN_BYTES = 64 << 20
_FULL = "No space left on device"
_QUOTA = "Disk quota exceeded"


def shown_bytes(size: float) -> str:
    """Show a number of bytes with one decimal and its unit, such as 1.5 GiB."""
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{size:.0f} B"


def full_disk(error: BaseException, where: Path | None = None) -> TopworkError | None:
    """Tell a full disk from other errors, whichever library met it.

    Args:
        error: What was raised; what it came from counts, too.
        where: Folder that was written to, if that is known.

    Returns:
        What the user is told; None for another error.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, TopworkError):
        if kind := _kind(seen):
            return _told(seen, kind, where)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


@contextmanager
def room_told(where: Path) -> Iterator[None]:
    """Say where the room ran out, should it.

    Args:
        where: Folder that the block writes to.

    Raises:
        UnavailableError: If its disk is full.
        SettingError: If its quota is used up.
    """
    try:
        yield
    except Exception as error:
        if told := full_disk(error, where):
            raise told from error
        raise


def require_room(where: Path, needed: int, what: str, limit: int | None = None) -> None:
    """Refuse to begin what the disk can't hold.

    Args:
        where: Folder that will be written to; it is there.
        needed: Bytes, as far as they are known.
        what: What takes them, for the sentence: "pulling s3://…".
        limit: Size of the volume in bytes (`spec.compute.scratch`), where the cluster ends a pod that goes beyond.

    Raises:
        SettingError: If it is more than the volume may hold.
        UnavailableError: If the disk has less room.
    """
    if limit is not None and needed > limit:
        raise SettingError(
            f"{what} takes about {shown_bytes(needed)} of the scratch volume, but spec.compute.scratch is "
            f"{shown_bytes(limit)}. Raise it: the cluster ends a pod whose volume grows beyond it."
        )
    free = shutil.disk_usage(where).free
    if needed + MARGIN_BYTES > free:
        raise UnavailableError(
            f"{what} takes about {shown_bytes(needed)}, and {where} has {shown_bytes(free)} free. Make room there, or "
            "take a larger disk or node, then start again."
        )


def _kind(error: BaseException) -> type[TopworkError] | None:
    number, text = getattr(error, "errno", None), str(error)
    # TensorFlow and HDF5 tell it in words alone.
    in_words = isinstance(error, OSError) or type(error).__module__.startswith(("tensorflow", "h5py"))
    if number == errno.ENOSPC or (in_words and _FULL in text):
        return UnavailableError
    if number == errno.EDQUOT or (in_words and _QUOTA in text):
        return SettingError
    return None


def _told(error: BaseException, kind: type[TopworkError], where: Path | None) -> TopworkError:
    name = getattr(error, "filename", None)
    place = str(where or name or "the disk that topwork writes to")
    free = ""
    if where and where.exists():
        usage = shutil.disk_usage(where)
        free = f" ({shown_bytes(usage.free)} of {shown_bytes(usage.total)} free)"
    file = f" while {name} was written" if where and name and str(name) != place else ""
    lack = "The quota is used up" if kind is SettingError else "There is no room left"
    return kind(
        f"{lack} in {place}{free}{file}. Make room there, or take a larger disk (in a cluster spec.compute.scratch, a "
        "node with more), then start again: what is stored is kept."
    )
