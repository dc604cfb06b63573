"""Importing TensorFlow without the messages that it prints while it starts."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from topwork.cli.runtime.environment import limit_tensorflow_log
from topwork.keras_import import import_keras

MAX_SHOWN_BYTES = 65536


@contextmanager
def quiet_tensorflow_import(*, verbose: bool = False) -> Iterator[None]:
    """Import TensorFlow, and suppress its startup messages until the block ends, unless `verbose`."""
    limit_tensorflow_log(verbose=verbose)
    if not verbose:
        # Every phase of a stage traces its own training step, and TensorFlow warns about repeated tracing.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with nullcontext() if verbose else suppress_stderr():
        import_keras()
        yield


@contextmanager
def suppress_stderr() -> Iterator[None]:
    """Suppress output to file descriptor 2, including that of C++ code. If the block fails, the output is printed."""
    sys.stderr.flush()
    saved = os.dup(2)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # when the pipe is full, further output is dropped instead of blocking
    os.dup2(writer, 2)
    try:
        yield
    except Exception:
        sys.stderr.flush()
        os.set_blocking(reader, False)
        with suppress(BlockingIOError):
            os.write(saved, os.read(reader, MAX_SHOWN_BYTES))
        raise
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        for descriptor in (saved, reader, writer):
            os.close(descriptor)
