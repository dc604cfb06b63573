"""Errors that users can act on, each with the exit code that the Job's pod failure policy evaluates.

    TopworkError
    ├── SpecError             2   the job spec is invalid
    ├── DataError             2   the data or a provided model is invalid
    │   └── FormatError       2   stored data was written by another version of topwork
    ├── SettingError          2   a setting outside the spec is invalid: credentials, bucket, option
    ├── GateError             3   the model was trained and evaluated, but did not meet a gate
    ├── UnavailableError     75   storage, the network or a GPU is unavailable, or a disk is full
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


MAX_QUOTED_CHARACTERS = 200
"""Limit of the text that a message quotes from an exception of a library."""

MAX_MESSAGE_LINES, MAX_MESSAGE_CHARACTERS = 40, 4000
"""Limits of a message that is shown to the user: about one screen."""


def shorten(text: str, length: int) -> str:
    """Put a text on one line and cut it.

    Args:
        text: Any text.
        length: Maximum number of characters.

    Returns:
        The text; an ellipsis at its end shows that it was cut.

    Example:
        >>> shorten("no such layer", 9)
        'no such …'
    """
    # Only the beginning is split into words: the text can be very long.
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else f"{line[: length - 1]}…"


def quote_error(error: BaseException, length: int = MAX_QUOTED_CHARACTERS) -> str:
    r"""Quote the message of an exception that a library raised, on one line.

    Args:
        error: The exception.
        length: Maximum number of characters.

    Returns:
        The first line of its message, or its type if it has no message.

    Example:
        >>> quote_error(ValueError("bad shape\nfull config: ..."))
        'bad shape'
    """
    text = str(error).strip()
    return shorten(text.partition("\n")[0] if text else type(error).__name__, length)


def limit_message(text: str) -> str:
    """Cut a message to about one screen.

    Args:
        text: The message, of one or several lines.

    Returns:
        The message. Its last line says how much was left out.
    """
    lines = text.splitlines()
    if len(lines) > MAX_MESSAGE_LINES:
        text = "\n".join([*lines[: MAX_MESSAGE_LINES - 1], f"… and {len(lines) - MAX_MESSAGE_LINES + 1} more lines"])
    if len(text) > MAX_MESSAGE_CHARACTERS:
        text = f"{text[:MAX_MESSAGE_CHARACTERS]}… ({len(text) - MAX_MESSAGE_CHARACTERS} more characters)"
    return text


def limit_traceback(text: str) -> str:
    """Cut the long lines of a traceback, such as the message of an exception that contains a whole model.

    Args:
        text: The traceback.

    Returns:
        The traceback with all its lines.
    """
    return "".join(
        f"{line[:MAX_MESSAGE_CHARACTERS]}…\n" if len(line) > MAX_MESSAGE_CHARACTERS else line
        for line in text.splitlines(keepends=True)
    )
