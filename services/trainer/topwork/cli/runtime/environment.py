"""What the commands find around them: the environment is read here, once, and nowhere else."""

import fcntl
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topwork.clients.url_policy import VARIABLE as ALLOW_HTTP
from topwork.clients.url_policy import allow_plain_http
from topwork.errors import SettingError
from topwork.redaction import hide, without_secrets

if TYPE_CHECKING:
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.clients.s3.storage import Meter, Storage

# Any of these means that the user has an object storage of their own.
STORAGE_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
)
LOGGER = logging.getLogger("topwork")
SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|API_?KEY")
# Variables that name where a secret is.
NO_SECRETS = ("_FILE", "_FILES", "_URI", "_URL", "_PATH", "_DIR", "_ENDPOINT")


def default_state(environment: Mapping[str, str] = os.environ) -> Path:
    """Folder that keeps the embedded S3 server and the scratch of runs between commands.

    Returns:
        `$TOPWORK_STATE`, else `topwork` below `$XDG_STATE_HOME` or `~/.local/state`.
    """
    if stated := environment.get("TOPWORK_STATE"):
        return Path(stated)
    home = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "topwork"


def has_own_storage(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the usual AWS variables or files name an object storage or an account."""
    files = (Path.home() / ".aws" / "credentials", Path.home() / ".aws" / "config")
    return any(environment.get(name) for name in STORAGE_VARIABLES) or any(file.exists() for file in files)


def own_storage(uri: str, meter: "Meter | None" = None) -> "Storage":
    """Open the storage that the AWS variables, files or accounts give access to.

    Args:
        uri: `s3://bucket[/prefix]`.
        meter: Where bytes and retries are counted.

    Returns:
        The storage, checked: the bucket is there and the credentials are good.

    Raises:
        SettingError: If the bucket is missing or the credentials are refused.
        UnavailableError: If the endpoint can't be reached.
    """
    from topwork.clients.s3.storage import Storage, StorageSettings

    storage = Storage(uri, StorageSettings(), meter)
    storage.check()
    return storage


@contextmanager
def storage_at(uri: str, state: Path | None = None, meter: "Meter | None" = None) -> "Iterator[Storage]":
    """Open the storage at an address: the user's own, or the embedded server where none is configured.

    Args:
        uri: `s3://bucket[/prefix]`.
        state: State folder; None is `default_state()`.
        meter: Where bytes and retries are counted.

    Yields:
        The storage, checked: the bucket is there and the credentials are good.

    Raises:
        SettingError: If the bucket is missing or the credentials are refused.
        UnavailableError: If the endpoint can't be reached.
    """
    from topwork.clients.s3.storage import Storage, make_bucket
    from topwork.local.server import embedded_storage

    if has_own_storage():
        yield own_storage(uri, meter)
        return
    with embedded_storage(state or default_state()) as settings:
        make_bucket(settings, re.sub(r"^s3://", "", uri).split("/")[0])
        yield Storage(uri, settings, meter)


@contextmanager
def scratch_of(state: Path, name: str) -> Iterator[Path]:
    """Hold the scratch of a run for this process alone.

    Args:
        state: State folder.
        name: Name of the run.

    Yields:
        The folder; kept after a failure, since a checkpoint's data or half a download may be in it.

    Raises:
        SettingError: If another process holds it.
    """
    scratch = state / "scratch" / name
    scratch.mkdir(parents=True, exist_ok=True)
    with (state / "scratch" / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingError(
                f"{name} is being run by another process on this machine. Wait for it to end."
            ) from error
        yield scratch
        shutil.rmtree(scratch, ignore_errors=True)


def serve(metrics: "Metrics", port: int) -> int:
    """Serve metrics for Prometheus.

    Args:
        metrics: The series.
        port: TCP port; 0 takes a free one.

    Returns:
        The port.

    Raises:
        SettingError: If the port is taken or not allowed.
    """
    try:
        return metrics.serve(port)
    except OSError as error:
        raise SettingError(
            f"--metrics-port {port} can't be listened on ({error.strerror}). Name another, or 0 for a free one."
        ) from error


def keep_secrets(environment: Mapping[str, str] = os.environ) -> None:
    """Let no value of a secret variable, and no password of a proxy or endpoint, be said or stored.

    The id of a key (`AWS_ACCESS_KEY_ID`) is a name and no secret, and with servers of one's own often a plain word; ids
    of Amazon are known by their form.

    Args:
        environment: The variables.
    """
    secrets = [
        value
        for name, value in environment.items()
        if SECRET_VARIABLE.search(name.upper()) and not name.upper().endswith(NO_SECRETS)
    ]
    # Parts of a URL: the password of https_proxy is none of the variables above.
    passwords = [found[1] for value in environment.values() if (found := re.search(r"://[^/\s:@]*:([^/\s]+)@", value))]
    hide((value.strip() for value in (*secrets, *passwords)), "environment")


def prepare_process(environment: Mapping[str, str] = os.environ) -> None:
    """Set what holds for the whole process: what is secret, also in what libraries log, and where plain HTTP may go.

    What ends a thread, and what Python drops in a callback, is logged as well: Python would print it as it is.

    Args:
        environment: The variables.
    """
    keep_secrets(environment)
    allow_plain_http(environment.get(ALLOW_HTTP, "").split(","))
    make = logging.getLogRecordFactory()

    def without(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        record.msg, record.args = without_secrets(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = without_secrets(logging.Formatter().formatException(record.exc_info))
        return record

    logging.setLogRecordFactory(without)
    threading.excepthook = _log_end_of_thread
    sys.unraisablehook = _log_dropped


def _log_end_of_thread(what: threading.ExceptHookArgs) -> None:
    if what.exc_value and not isinstance(what.exc_value, SystemExit):
        name = what.thread.name if what.thread else "a thread"
        LOGGER.error("Exception in thread %s", name, exc_info=what.exc_value)


def _log_dropped(what: "sys.UnraisableHookArgs") -> None:
    if what.exc_value:
        LOGGER.error("%s %r", what.err_msg or "Exception ignored in:", what.object, exc_info=what.exc_value)


@contextmanager
def quiet_start(*, verbose: bool = False) -> Iterator[None]:
    """Keep TensorFlow's start-up talk away while it is imported, unless it is wanted."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "2")
    if not verbose:
        # Each phase of a stage traces a step of its own, which TensorFlow takes for a mistake.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with nullcontext() if verbose else hushed():
        yield


@contextmanager
def hushed() -> Iterator[None]:
    """Keep what C++ code writes to standard error away from the user: TensorFlow's start-up talk.

    What was written is shown after all when the block fails.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # more than a pipe holds is dropped, never waited for
    os.dup2(writing, 2)
    try:
        yield
    except Exception:
        sys.stderr.flush()
        os.set_blocking(reading, False)
        with suppress(BlockingIOError):
            os.write(kept, os.read(reading, 65536))
        raise
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        for descriptor in (kept, reading, writing):
            os.close(descriptor)
