"""Which failures are told in a sentence, and with which exit code."""

from topwork.cancellation import STOPPED, StopNow
from topwork.disk_space import full_disk
from topwork.errors import SettingError, Stopped, TopworkError

BUG = 1
"""Exit code of what nobody foresaw."""

INSTALL = "To train and predict, install topwork[cpu] or topwork[gpu]; for the embedded S3 server, topwork[local]."


def failure_of(error: BaseException) -> TopworkError | None:
    """Find the sentence for what was raised.

    Args:
        error: What ended a command.

    Returns:
        The failure as a user is told of it; None for a bug, which keeps its traceback.
    """
    if isinstance(error, TopworkError):
        return error
    if isinstance(error, StopNow | KeyboardInterrupt):
        return Stopped(STOPPED)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("topwork"):
        return SettingError(f"{error.name} is not installed. {INSTALL}")
    return full_disk(error)
