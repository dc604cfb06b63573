"""Start of TensorFlow's collective runtime on several nodes, during which the process keeps reacting.

The constructor of MultiWorkerMirroredStrategy waits for the other nodes without a time limit and holds the GIL
meanwhile: no thread of Python runs, so that nothing notices that another node failed. It also replaces the handler of
SIGTERM by one that only sets a flag of TensorFlow.
"""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import errors_impl

log = structlog.get_logger(__name__)

RESTORE_SECONDS = 0.005
SIGACTION_BYTES = 512
"""More than any platform's `struct sigaction`."""


@contextmanager
def responsive_start() -> Iterator[None]:
    """Release the GIL while TensorFlow connects the nodes in the block, and keep the handlers of SIGTERM and SIGINT.

    Raises:
        tensorflow.errors.OpError: If the nodes could not be connected.
    """
    bindings = context.pywrap_tfe
    original = bindings.TFE_EnableCollectiveOps
    bindings.TFE_EnableCollectiveOps = _load_without_gil() or original
    try:
        with _keep_signal_handlers():
            yield
    finally:
        bindings.TFE_EnableCollectiveOps = original


def _load_without_gil() -> Any:
    """Return `TFE_EnableCollectiveOps` of the C API, which `ctypes` calls without the GIL; None if it is not found."""
    directory = Path(tf.sysconfig.get_lib())
    try:
        framework = ctypes.CDLL(str(directory / "libtensorflow_framework.so.2"))
        enable = ctypes.CDLL(str(directory / "libtensorflow_cc.so.2")).TFE_EnableCollectiveOps
        new_status, delete_status = framework.TF_NewStatus, framework.TF_DeleteStatus
        get_code, get_message = framework.TF_GetCode, framework.TF_Message
    except (OSError, AttributeError) as error:
        log.warning("TensorFlow blocks this process while it connects the nodes", reason=str(error))
        return None
    enable.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p)
    enable.restype = None
    new_status.restype = ctypes.c_void_p
    delete_status.argtypes = get_code.argtypes = get_message.argtypes = (ctypes.c_void_p,)
    get_message.restype = ctypes.c_char_p
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.argtypes, pointer_of.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p

    def enable_collective_ops(handle: Any, server: bytes) -> None:
        status = new_status()
        try:
            enable(pointer_of(handle, None), server, len(server), status)
            if code := get_code(status):
                message = get_message(status).decode(errors="replace")
                raise errors_impl.exception_type_from_error_code(code)(None, None, message)
        finally:
            delete_status(status)

    return enable_collective_ops


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Restore the handlers that Python installed, soon after TensorFlow has replaced one."""
    sigaction = ctypes.CDLL(None).sigaction
    saved = {number: ctypes.create_string_buffer(SIGACTION_BYTES) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, action in saved.items():
        sigaction(int(number), None, action)
    finished = threading.Event()

    def restore() -> None:
        while True:
            is_last = finished.wait(RESTORE_SECONDS)
            for number, action in saved.items():
                sigaction(int(number), action, None)
            if is_last:
                return

    thread = threading.Thread(target=restore, name="signal handlers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
