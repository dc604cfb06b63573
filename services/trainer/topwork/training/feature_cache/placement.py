"""Where features of a dataset have room: in memory, else on scratch."""

import shutil
from pathlib import Path
from typing import Literal

from topwork.spec import TransferJob
from topwork.spec.compute import in_bytes

Place = Literal["memory", "scratch"]

# Features may take this share of the memory that is free; the rest is for training.
MEMORY_SHARE = 0.25
# Resized images may take half of the scratch volume, whose limit ends the pod; features a quarter.
SCRATCH_SHARE = 0.25
FREE_SHARE = 0.5


def place_for(needed: int, scratch: Path, job: TransferJob) -> Place | None:
    """Say where features are kept.

    Args:
        needed: Bytes.
        scratch: Scratch folder.
        job: The job, for the size of its scratch volume.

    Returns:
        The fastest place that has room; None where there is none.
    """
    if needed <= MEMORY_SHARE * free_memory():
        return "memory"
    on_disk = min(FREE_SHARE * shutil.disk_usage(scratch).free, SCRATCH_SHARE * in_bytes(job.spec.compute.scratch))
    return "scratch" if needed <= on_disk else None


def free_memory(root: Path = Path("/")) -> int:
    """Say how many bytes of memory this process can still take: of the machine, and of its container (cgroup v2).

    Args:
        root: Where /proc and /sys lie.
    """
    free = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = root / "sys/fs/cgroup"
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no Linux, no such group, or "max": no limit
    return max(0, min(free, default=0))
