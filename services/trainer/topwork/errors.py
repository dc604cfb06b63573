"""Everything that can go wrong for a user, each with the exit code that Kubernetes reads.

    TopworkError
    ├── SpecError             2   the job spec is wrong
    ├── DataError             2   the data or a model handed in is wrong
    │   └── FormatError       2   what is stored was written by another topwork
    ├── SettingError          2   a setting outside the spec is wrong: credentials, bucket, option
    ├── GateError             3   the model was trained and evaluated, and a gate was not met
    ├── UnavailableError     75   storage or the network failed after its retries
    │   └── DamagedError     75   what storage gave, more than once, is not what was stored
    └── Stopped             143   asked to stop; the checkpoint is written

Whatever else is raised is a bug and keeps its traceback (exit code 1).
"""


class TopworkError(Exception):
    """A failure that is told to the user in a sentence and without a traceback."""

    exit_code = 1


class SpecError(TopworkError):
    """The job spec is wrong. Never retried."""

    exit_code = 2


class DataError(TopworkError):
    """The data, or a model or archive handed in, is wrong. Never retried."""

    exit_code = 2


class FormatError(DataError):
    """What is stored was written by an older or newer topwork, which can read it. Never retried."""


class SettingError(TopworkError):
    """A setting outside the spec is wrong: credentials, a bucket, an option. Never retried."""

    exit_code = 2


class GateError(TopworkError):
    """The model was trained and evaluated, and a gate of `spec.evaluate` was not met. Never retried."""

    exit_code = 3


class UnavailableError(TopworkError):
    """Storage or the network failed after its retries (EX_TEMPFAIL of sysexits.h). Worth another try."""

    exit_code = 75


class DamagedError(UnavailableError):
    """What storage gave is not what was stored: its bytes changed there or on the way."""


class Stopped(TopworkError):  # noqa: N818 - a wish that was granted, not an error
    """The process was asked to stop (SIGTERM) and has written its checkpoint."""

    exit_code = 143
