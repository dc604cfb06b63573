"""Errors that users can act on, each with the exit code that the Job's pod failure policy evaluates.

    TopworkError
    ├── SpecError             2   the job spec is invalid
    ├── DataError             2   the data or a provided model is invalid
    │   └── FormatError       2   stored data was written by another version of topwork
    ├── SettingError          2   a setting outside the spec is invalid: credentials, bucket, option
    ├── GateError             3   the model was trained and evaluated, but did not meet a gate
    ├── UnavailableError     75   storage or the network failed after all retries
    │   └── DamagedError     75   storage repeatedly returned different bytes than were stored
    └── Stopped             143   a stop was requested; the checkpoint is stored

Any other exception is a bug: it keeps its traceback and ends with exit code 1.
"""


class TopworkError(Exception):
    """An error that is reported to the user as a message without a traceback."""

    exit_code = 1


class SpecError(TopworkError):
    """The job spec is invalid. Never retried."""

    exit_code = 2


class DataError(TopworkError):
    """The data, or a provided model or archive, is invalid. Never retried."""

    exit_code = 2


class FormatError(DataError):
    """Stored data was written by an older or newer version of topwork; use that version to read it. Never retried."""


class SettingError(TopworkError):
    """A setting outside the spec is invalid: credentials, a bucket, an option. Never retried."""

    exit_code = 2


class GateError(TopworkError):
    """The model was trained and evaluated, but did not meet a gate of `spec.evaluate`. Never retried."""

    exit_code = 3


class UnavailableError(TopworkError):
    """Storage or the network failed after all retries (EX_TEMPFAIL of sysexits.h). Retried by the Job."""

    exit_code = 75


class DamagedError(UnavailableError):
    """Storage returned different bytes than were stored: they were changed in storage or in transit."""


class Stopped(TopworkError):  # noqa: N818 - a request that was fulfilled, not an error
    """A stop was requested (SIGTERM), and the checkpoint is stored."""

    exit_code = 143
