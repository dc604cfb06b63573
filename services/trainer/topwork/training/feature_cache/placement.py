"""Placement of cached features: in memory if they fit, otherwise on the scratch volume."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
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
    """Return the bytes of memory that this process can still allocate, limited by the machine and by its cgroups.

    The kernel reclaims clean page cache before it kills a process. As for the kubelet, the used memory of a cgroup is
    therefore its working set: its usage without the file cache that was not used recently (`inactive_file`).

    Args:
        root: Directory that contains /proc and /sys.
    """
    available = [*_available_on_machine(root), *_available_in_cgroups(root)]
    # Without /proc/meminfo, the free memory is unknown and counts as 0.
    return max(0, min(available, default=0))


def _available_on_machine(root: Path) -> Iterator[int]:
    with suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * int(line.split()[1])


def _available_in_cgroups(root: Path) -> Iterator[int]:
    """Yield the free memory of the cgroup of this process and of all cgroups around it, as far as they have a limit."""
    paths = _cgroup_paths(root)
    for version in _CGROUP_VERSIONS:
        mount = root / version.mount
        group = (mount / paths.get(version.controller, "").lstrip("/")).resolve()
        # In a container, the path may be that on the node; the mount is then the cgroup of the container.
        groups = [group, *group.parents] if group.is_dir() else []
        for directory in [*(group for group in groups if group.is_relative_to(mount.resolve())), mount]:
            with suppress(OSError, ValueError):  # no cgroup of this version, or no limit ("max")
                limit = int((directory / version.limit).read_text())
                yield limit - _working_set(directory, version)


def _working_set(directory: Path, version: "_CgroupVersion") -> int:
    usage = int((directory / version.usage).read_text())
    with suppress(OSError, ValueError):
        statistics = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        return max(0, usage - int(statistics.get(version.inactive_file, 0)))
    return usage


def _cgroup_paths(root: Path) -> dict[str, str]:
    """Return the cgroup of this process by controller; version 2 has one cgroup for all of them, named ""."""
    paths: dict[str, str] = {}
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)
    return paths


@dataclass(frozen=True)
class _CgroupVersion:
    """Where a version of cgroups is mounted, and the names of its memory files."""

    controller: str
    mount: str
    limit: str
    usage: str
    inactive_file: str


_CGROUP_VERSIONS = (
    _CgroupVersion("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    _CgroupVersion(
        "memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    ),
)


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
    # Not truncated: an earlier stage of this process may still have mapped the old file.
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        # Fails here if the disk is full: a write to mapped memory without disk space kills the process.
        os.posix_fallocate(file.fileno(), 0, prod(shape) * dtype.itemsize)
    return np.memmap(path, dtype, "r+", shape=shape).view(np.ndarray)
