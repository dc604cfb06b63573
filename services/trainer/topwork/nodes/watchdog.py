"""Ends this process after some time, even while a library blocks all threads of Python."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CLOCK_MONOTONIC, _SIGEV_THREAD = 1, 2  # time.h and signal.h of Linux


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of Linux on 64-bit machines."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 32),
    )


class _TimerTime(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


@contextmanager
def exit_after(seconds: int, code: int) -> Iterator[None]:
    """End the process if the block takes longer than some time. On other systems than Linux, this does nothing.

    TensorFlow holds Python's global lock while it connects to the servers of other nodes, so that no thread and no
    signal handler of Python runs. A timer of the operating system calls `_exit` in a thread of its own.

    Args:
        seconds: Longest duration of the block.
        code: Exit code.
    """
    if sys.platform != "linux":
        yield
        return
    library = ctypes.CDLL(None)
    function = ctypes.cast(library._exit, ctypes.c_void_p)
    event, timer = _SignalEvent(code, 0, _SIGEV_THREAD, function), ctypes.c_void_p()
    if library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError("timer_create failed: too many timers or too little memory")
    try:
        library.timer_settime(timer, 0, ctypes.byref(_TimerTime(0, 0, seconds, 0)), None)
        yield
    finally:
        library.timer_delete(timer)
