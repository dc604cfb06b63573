"""The last things a process does for who watches its metrics: exit code, Pushgateway, time for a last scrape."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from topwork.cancellation import STOPPED, StopNow
from topwork.cli.runtime.exit_codes import BUG, failure_of
from topwork.cli.runtime.signals import NUMBERS
from topwork.errors import Stopped, TopworkError

if TYPE_CHECKING:
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.progress import Progress
    from topwork.spec import TransferJob

# A process that was asked to stop is killed soon.
SECONDS_AFTER_A_STOP = 2.0


@contextmanager
def parting(job: "TransferJob", metrics: "Metrics", progress: "Progress", *, served: bool) -> Iterator[None]:
    """Tell the metrics of `topwork run` how the block has ended, whatever it raises.

    Args:
        job: The job that the block runs.
        metrics: Its series.
        progress: Where a person is told.
        served: Whether a port shows them.

    Raises:
        Stopped: If asked to, while the port was kept open: no other job is to begin.
    """
    code = 0
    try:
        yield
    except BaseException as error:
        known = failure_of(error)
        code = known.exit_code if known else BUG
        raise
    finally:
        metrics.exit_code("run", code)
        stopped = code == Stopped.exit_code
        hand_over(job, metrics, progress, stopped=stopped)
        seconds = job.spec.metrics.linger_seconds if served and not stopped else 0
        if seconds:
            progress.note("metrics stay open", seconds=seconds, exit_code=code)
            if linger(seconds) and not code:
                raise Stopped(STOPPED)


def hand_over(job: "TransferJob", metrics: "Metrics", progress: "Progress", *, stopped: bool = False) -> None:
    """Send the outcome to the job's Pushgateway, if it has one; one that is away or slow costs a line and seconds.

    Args:
        job: The job.
        metrics: Its series.
        progress: Where a failure is told.
        stopped: Whether the process was asked to stop.
    """
    if (gateway := job.spec.metrics.pushgateway) is None:
        return
    from topwork.clients.prometheus.pushgateway import TIMEOUT_SECONDS, push

    try:
        push(gateway, metrics, seconds=SECONDS_AFTER_A_STOP if stopped else TIMEOUT_SECONDS)
    except TopworkError as error:
        progress.note("outcome not pushed", reason=str(error))


def linger(seconds: float) -> bool:
    """Keep the process, and with it the port, until the time is over or somebody asks to stop.

    Args:
        seconds: How long.

    Returns:
        Whether somebody asked to stop.
    """

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise StopNow

    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        for number in NUMBERS:
            signal.signal(number, leave)
        time.sleep(seconds)
    except StopNow:
        return True
    finally:
        with suppress(StopNow):
            for number, handler in before.items():
                signal.signal(number, handler)
    return False
