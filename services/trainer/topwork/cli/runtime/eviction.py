"""Recognizing that the kubelet evicts this pod for lack of disk space, which must count as a failure of the Job.

A process that stops on SIGTERM exits with 143, which the Job does not count: it is usually drained or preempted. If the
kubelet evicts a pod for its use of the disk, the next pod would fill the disk again, as often as the deadline allows.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from topwork.disk_space import format_bytes
from topwork.errors import SettingError, TopworkError, UnavailableError

EVICTION_SECONDS = 2.0
"""The kubelet kills an evicted pod one second after SIGTERM: whoever still runs later was not evicted."""
FREE_SHARE = 0.15
"""The kubelet evicts pods when less of a disk is free, by default: 10 % (nodefs) or 15 % (imagefs)."""
MEASURE_SECONDS = 0.5
BLOCK_BYTES = 512
"""Unit of st_blocks."""


def eviction_error(scratch: Path, limit: int, seconds_since_signal: float) -> TopworkError | None:
    """Return the error of a stopped process whose pod is most likely evicted for lack of disk space.

    Args:
        scratch: The scratch volume.
        limit: Its size limit in bytes (`spec.compute.scratch`).
        seconds_since_signal: Time since SIGTERM.

    Returns:
        SettingError if the volume exceeds its limit: a new pod would exceed it, too. UnavailableError if the disk of
        the node is nearly full. None if neither is true, or if the process has survived longer than an evicted one.
    """
    if seconds_since_signal > EVICTION_SECONDS:
        return None
    used = _used_bytes(scratch)
    if used > limit:
        return SettingError(
            f"{scratch} contains {format_bytes(used)}, more than spec.compute.scratch allows ({format_bytes(limit)}): "
            "the cluster evicts the pod. Raise spec.compute.scratch."
        )
    disk = shutil.disk_usage(scratch)
    if disk.free < FREE_SHARE * disk.total:
        return UnavailableError(
            f"Stopped while the disk of the node was nearly full ({format_bytes(disk.free)} of "
            f"{format_bytes(disk.total)} free): the cluster evicts pods from such a node. Free disk space on it, or "
            "keep the run off it with spec.compute.nodeSelector or affinity."
        )
    return None


def _used_bytes(directory: Path) -> int:
    """Return the disk space of all files in a directory, or of as many as can be measured before the pod is killed."""
    deadline, used = time.monotonic() + MEASURE_SECONDS, 0
    for entry in _entries(str(directory)):
        with suppress(OSError):  # deleted in the meantime
            used += entry.stat(follow_symlinks=False).st_blocks * BLOCK_BYTES
        if time.monotonic() > deadline:
            break
    return used


def _entries(directory: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    yield from _entries(entry.path)
    except OSError:
        return  # deleted in the meantime, or not readable
