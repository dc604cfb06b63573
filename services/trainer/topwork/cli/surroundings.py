"""What the commands find around them: the environment is read here, once, and nowhere else."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from topwork.edge.storage import Meter, Storage, StorageSettings, make_bucket
from topwork.local.server import embedded_storage

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


@contextmanager
def storage_at(uri: str, state: Path | None = None, meter: Meter | None = None) -> Iterator[Storage]:
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
    if has_own_storage():
        storage = Storage(uri, StorageSettings(), meter)
        storage.check()
        yield storage
        return
    with embedded_storage(state or default_state()) as settings:
        make_bucket(settings, re.sub(r"^s3://", "", uri).split("/")[0])
        yield Storage(uri, settings, meter)


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
    except BaseException:
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
