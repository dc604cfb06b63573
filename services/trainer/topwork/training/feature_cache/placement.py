"""Placement of cached features: in memory if they fit, otherwise on the scratch volume."""

import os
import shutil
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from topwork.spec import TransferJob
from topwork.spec.kubernetes_types import quantity_to_bytes

Placement = Literal["memory", "scratch"]

# Share of the free memory for features; training needs the rest.
MEMORY_SHARE = 0.25
# Share of the scratch volume for features. Resized images may take half of it; a pod that exceeds the limit is evicted.
SCRATCH_SHARE = 0.25
FREE_SHARE = 0.5


def choose_placement(size_bytes: int, scratch: Path, job: TransferJob) -> Placement | None:
    """Choose where to store features.

    Args:
        size_bytes: Size of all features.
        scratch: Scratch directory.
        job: The job, for the size of its scratch volume.

    Returns:
        The fastest placement with enough free space; None if there is none.
    """
    if size_bytes <= MEMORY_SHARE * available_memory():
        return "memory"
    on_disk = min(
        FREE_SHARE * shutil.disk_usage(scratch).free,
        SCRATCH_SHARE * quantity_to_bytes(job.spec.compute.scratch),
    )
    return "scratch" if size_bytes <= on_disk else None


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process can still allocate, limited by machine and cgroup (v2).

    Args:
        root: Directory that contains /proc and /sys.
    """
    available = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        cgroup = root / "sys/fs/cgroup"
        available.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no cgroup v2 limit; without /proc/meminfo, the free memory is unknown and counts as 0
    return max(0, min(available, default=0))


def allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], placement: Placement) -> npt.NDArray[Any]:
    """Allocate an array in memory, or memory-mapped on the scratch volume.

    Args:
        path: File to map if the array is placed on scratch.
        shape: Shape of the array.
        dtype: Type of the values.
        placement: Where to place the array.

    Returns:
        An uninitialized array.

    Raises:
        OSError: If the disk is full.
    """
    if placement == "memory":
        return np.empty(shape, dtype)
    with path.open("wb") as file:
        # Fails here if the disk is full: a write to mapped memory without disk space kills the process.
        os.posix_fallocate(file.fileno(), 0, prod(shape) * dtype.itemsize)
    return np.memmap(path, dtype, "r+", shape=shape).view(np.ndarray)
