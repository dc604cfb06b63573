"""Logging: structlog configuration for JSON lines in containers and readable lines on pipes and terminals.

Every module logs with `structlog.get_logger(__name__)`. All records, including those of libraries, pass through one
handler of the root logger, which redacts secrets in events, fields and tracebacks.
"""

import logging
import math
import sys
import threading
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from typing import Any, TextIO

import structlog
from rich.console import Console
from rich.text import Text
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import EventRenamer, JSONRenderer, TimeStamper, format_exc_info
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor

from topwork.errors import limit_message, limit_traceback
from topwork.redaction import redact

log = structlog.get_logger(__name__)


class LogFormat(StrEnum):
    """Format of log lines that do not go to a terminal."""

    text = "text"
    json = "json"


def configure_logging(log_format: LogFormat = LogFormat.text, stream: TextIO | None = None) -> None:
    """Send the logs of topwork and of all libraries to standard error or to a stream.

    Topwork logs at level INFO unless `set_log_level` selected another level, and libraries log at WARNING. Python
    warnings and unhandled exceptions in threads, callbacks and finalizers are logged, too.

    Args:
        log_format: Format of the lines; a terminal always gets text.
        stream: Destination of the lines. None is standard error, through `stderr_console()` if that is a terminal.
    """
    configure_structlog()
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler.formatter, ProcessorFormatter)]
    root.addHandler(_create_handler(log_format, stream))
    root.setLevel(logging.WARNING)
    topwork = logging.getLogger("topwork")
    topwork.setLevel(topwork.level or logging.INFO)
    # Otherwise the logging module prints records that it can't format to standard error, including their secrets.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_exception
    sys.unraisablehook = _log_unraisable_exception


def _create_handler(log_format: LogFormat, stream: TextIO | None) -> logging.Handler:
    handler: logging.Handler
    if stream is None and sys.stderr.isatty():
        handler = _ConsoleHandler(stderr_console())
        renderers = _text_renderers(colors=True)
    else:
        handler = logging.StreamHandler(stream or sys.stderr)
        renderers = _json_renderers() if log_format is LogFormat.json else _text_renderers(colors=False)
    handler.setFormatter(
        ProcessorFormatter(
            processors=[ProcessorFormatter.remove_processors_meta, format_exc_info, _redact_event, *renderers],
            foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name],
        )
    )
    return handler


def configure_structlog() -> None:
    """Pass structlog's events to the loggers of the standard library."""
    processors: list[Processor] = [
        structlog.stdlib.filter_by_level,
        structlog.stdlib.add_log_level,
        ProcessorFormatter.wrap_for_formatter,
    ]
    structlog.configure(
        processors=processors,
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def set_log_level(level: int) -> None:
    """Set the minimum level of topwork's own messages, such as `logging.DEBUG`."""
    logging.getLogger("topwork").setLevel(level)


def is_verbose() -> bool:
    """Whether debug messages are logged."""
    return logging.getLogger("topwork").isEnabledFor(logging.DEBUG)


@cache
def stderr_console() -> Console:
    """Return the console of standard error; log lines and progress bars share it, so that they do not overlap."""
    return Console(stderr=True)


class _ConsoleHandler(logging.Handler):
    """Prints log lines above the progress bars of a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(Text.from_ansi(self.format(record)), soft_wrap=True)
        except Exception:  # as StreamHandler does: a failure to log must not end a run
            self.handleError(record)


def _json_renderers() -> list[Processor]:
    return [_timestamp(), EventRenamer("message"), _order_keys, JSONRenderer()]


def _text_renderers(*, colors: bool) -> list[Processor]:
    renderer = ConsoleRenderer(
        colors=colors,
        pad_event_to=0,
        pad_level=False,
        sort_keys=False,
        timestamp_key="time",
        exception_formatter=plain_traceback,
    )
    return [_round_floats, renderer] if colors else [_timestamp(), _round_floats, renderer]


def _timestamp() -> TimeStamper:
    return TimeStamper("%Y-%m-%dT%H:%M:%SZ", utc=True, key="time")


def _redact_event(_logger: object, _method: str, event: EventDict) -> EventDict:
    event["event"] = str(event["event"]).rstrip()
    redacted = {name: _redact_value(value) for name, value in event.items()}
    limits = {"exception": limit_traceback}
    return {
        name: limits.get(name, limit_message)(value) if isinstance(value, str) else value
        for name, value in redacted.items()
    }


def _redact_value(value: Any) -> Any:
    """Redact strings at any depth, and convert values without a JSON type (objects, NaN, infinity) to strings."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {redact(str(key)): _redact_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_value(item) for item in value]
    return redact(str(value))


def _order_keys(_logger: object, _method: str, event: EventDict) -> EventDict:
    head = {name: event.pop(name) for name in ("time", "level", "message")}
    traceback = {"traceback": event.pop("exception")} if "exception" in event else {}
    return {**head, **event, **traceback}


def _round_floats(_logger: object, _method: str, event: EventDict) -> EventDict:
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in event.items()}


def _log_thread_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value and not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread else "unknown"
        log.error(f"Exception in thread {name}", exc_info=args.exc_value)


def _log_unraisable_exception(args: "sys.UnraisableHookArgs") -> None:
    if args.exc_value:
        log.error(f"{args.err_msg or 'Exception ignored in:'} {args.object!r}", exc_info=args.exc_value)
