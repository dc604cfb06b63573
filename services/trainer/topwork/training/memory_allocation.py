"""Reuse of freed memory by training steps on CPUs."""

import ctypes
import platform

# Parameters of mallopt in malloc.h of glibc.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MAX_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, for the rest of this process.

    By default, glibc returns large blocks to the kernel when they are freed. A training step on a CPU frees hundreds of
    them and allocates them again, and the kernel clears every page anew: that takes a tenth to a quarter of the step.
    The process needs about as much memory as before at its peak, and keeps it. Does nothing with other C libraries.

    See https://man7.org/linux/man-pages/man3/mallopt.3.html.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    library.mallopt(M_TRIM_THRESHOLD, MAX_INT)
    library.mallopt(M_TOP_PAD, 64 << 20)
