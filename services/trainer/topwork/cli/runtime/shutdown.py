"""Exit codes, and the last steps of a process for monitoring: a push to the Pushgateway and time for a last scrape."""

import errno
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import structlog

from topwork.cancellation import STOPPED_MESSAGE, StopInterrupt
from topwork.cli.runtime.signals import STOP_SIGNALS
from topwork.disk_space import disk_full_error
from topwork.errors import SettingError, Stopped, TopworkError, quote_error

if TYPE_CHECKING:
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.spec import TransferJob

log = structlog.get_logger(__name__)

EXIT_CODE_BUG = 1
"""Exit code after an unexpected exception."""
INSTALL_HINT = (
    "To train and predict, install topwork[cpu] or topwork[gpu]; for searches, topwork[search]; for the embedded S3 "
    "server, topwork[local]."
)
# SIGKILL follows soon after SIGTERM.
PUSH_SECONDS_AFTER_STOP = 2.0


def to_topwork_error(error: BaseException) -> TopworkError | None:
    """Convert an exception to the error that is reported to the user.

    Args:
        error: The exception that ended a command.

    Returns:
        The error with its message and exit code; None for a bug, which keeps its traceback.
    """
    if isinstance(error, TopworkError):
        return error
    if isinstance(error, StopInterrupt | KeyboardInterrupt):
        return Stopped(STOPPED_MESSAGE)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("topwork"):
        return SettingError(f"{error.name} is not installed. {INSTALL_HINT}")
    return disk_full_error(error) or _out_of_memory_error(error)


def _out_of_memory_error(error: BaseException) -> TopworkError | None:
    """Return an error with exit code 2 if memory could not be allocated: a retry would need as much memory again."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TopworkError):
        # C++ code in Python modules reports std::bad_alloc as a MemoryError.
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return SettingError(
                f"Memory is exhausted ({quote_error(cause)}). Provide more memory (in a cluster, raise "
                "spec.compute.memory), or use less: lower batchSize or spec.dataset.imageSize, or set featureCache: "
                "off."
            )
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


@contextmanager
def record_outcome(job: "TransferJob", metrics: "Metrics", *, served: bool) -> Iterator[None]:
    """Record the exit code of a block in the metrics of `topwork run`, push it, and wait for a last scrape.

    Args:
        job: The job that the block runs.
        metrics: Its metrics.
        served: Whether the metrics are served on a port.

    Raises:
        Stopped: If a stop was requested during the wait, so that no further job starts.
    """
    code = 0
    try:
        yield
    except BaseException as error:
        known = to_topwork_error(error)
        code = known.exit_code if known else EXIT_CODE_BUG
        raise
    finally:
        metrics.set_exit_code("run", code)
        stopped = code == Stopped.exit_code
        push_to_pushgateway(job, metrics, stopped=stopped)
        seconds = job.spec.metrics.linger_seconds if served and not stopped else 0
        if seconds:
            log.info("metrics port stays open", seconds=seconds, exit_code=code)
            if wait_for_last_scrape(seconds) and not code:
                raise Stopped(STOPPED_MESSAGE)


def push_to_pushgateway(job: "TransferJob", metrics: "Metrics", *, stopped: bool = False) -> None:
    """Push the outcome to the job's Pushgateway, if it has one. A failure is logged and changes nothing else.

    Args:
        job: The job.
        metrics: Its metrics.
        stopped: Whether a stop was requested, which shortens the timeout.
    """
    if (gateway := job.spec.metrics.pushgateway) is None:
        return
    from topwork.clients.prometheus.pushgateway import TIMEOUT_SECONDS, push_outcome

    try:
        push_outcome(gateway, metrics, seconds=PUSH_SECONDS_AFTER_STOP if stopped else TIMEOUT_SECONDS)
    except TopworkError as error:
        log.warning("outcome not pushed", reason=str(error))


def wait_for_last_scrape(seconds: float) -> bool:
    """Keep the process and its metrics port alive for some time, or until a stop is requested.

    Args:
        seconds: How long to wait.

    Returns:
        Whether a stop was requested.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise StopInterrupt

    previous_handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, interrupt)
        time.sleep(seconds)
    except StopInterrupt:
        return True
    finally:
        with suppress(StopInterrupt):
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)
    return False
