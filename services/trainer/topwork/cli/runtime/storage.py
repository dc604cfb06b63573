"""Opening the storage and the scratch directory of a command: configured S3, a pod's Secret, or the embedded server."""

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from topwork.cli.runtime.environment import (
    default_state_directory,
    has_storage_configuration,
    missing_storage_variables,
)
from topwork.cluster.names import STORAGE_SECRET
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.clients.s3.storage import Storage, TransferCounter


# Storage is optional for some commands: they fail fast if it is unreachable.
OPTIONAL_ATTEMPTS, OPTIONAL_CONNECT_SECONDS = 2, 3.0


def open_configured_storage(uri: str, counter: "TransferCounter | None" = None) -> "Storage":
    """Open a storage with the credentials of the AWS variables, files or instance roles.

    Args:
        uri: `s3://bucket[/prefix]`.
        counter: Counts bytes and retries.

    Returns:
        The storage, after checking that the bucket exists and the credentials are valid.

    Raises:
        SettingError: If the bucket does not exist or the credentials are rejected.
        UnavailableError: If the endpoint can't be reached.
    """
    from topwork.clients.s3.storage import Storage, StorageSettings

    storage = Storage(uri, StorageSettings(), counter)
    storage.check()
    return storage


def open_pod_storage(uri: str, counter: "TransferCounter") -> "Storage":
    """Open the storage of a job with the variables of its Secret, or the role of the pod or node.

    Args:
        uri: `s3://bucket[/prefix]`.
        counter: Counts bytes and retries.

    Returns:
        The storage, after checking that the bucket exists and the credentials are valid.

    Raises:
        SettingError: If there are no credentials, they are rejected, or the bucket does not exist.
        UnavailableError: If the endpoint can't be reached.
    """
    from topwork.clients.s3.errors import NoCredentialsError

    try:
        return open_configured_storage(uri, counter)
    except NoCredentialsError as error:
        keys, lacks_endpoint = missing_storage_variables()
        missing = " and ".join(keys)
        endpoint = " and, for a server that isn't Amazon's, AWS_ENDPOINT_URL" if lacks_endpoint else ""
        raise SettingError(
            f"No credentials for {uri}: the container lacks {missing}. Add {missing}{endpoint} to the Secret "
            f"{STORAGE_SECRET} in the pod's namespace (kubectl create secret generic {STORAGE_SECRET} "
            "--from-literal=AWS_ACCESS_KEY_ID=…), or set spec.compute.serviceAccountName to a service account that "
            "has access to the bucket."
        ) from error


@contextmanager
def open_storage(uri: str, state: Path | None = None, counter: "TransferCounter | None" = None) -> "Iterator[Storage]":
    """Open a storage: the user's own, or the embedded server if none is configured.

    Args:
        uri: `s3://bucket[/prefix]`.
        state: State directory; None for `default_state_directory()`.
        counter: Counts bytes and retries.

    Yields:
        The storage, after checking that the bucket exists and the credentials are valid.

    Raises:
        SettingError: If the bucket does not exist or the credentials are rejected.
        UnavailableError: If the endpoint can't be reached.

    Example:
        with open_storage("s3://photos/topwork") as storage:
            print([stored.key for stored in storage.list("models/")])
    """
    from topwork.clients.s3.storage import Storage, create_bucket
    from topwork.local.server import embedded_storage

    if has_storage_configuration():
        yield open_configured_storage(uri, counter)
        return
    with embedded_storage(state or default_state_directory()) as settings:
        create_bucket(settings, re.sub(r"^s3://", "", uri).split("/")[0])
        yield Storage(uri, settings, counter)


@contextmanager
def open_optional_storage(uri: str, state: Path | None = None) -> "Iterator[Storage | None]":
    """Open the configured storage, or the embedded one if an earlier run used it. Fails within seconds.

    Args:
        uri: `s3://bucket[/prefix]`.
        state: State directory of the embedded server; None to open only a configured storage.

    Yields:
        The storage, after checking that the bucket exists and the credentials are valid; None if there is none.

    Raises:
        SettingError: If the bucket does not exist or the credentials are rejected.
        UnavailableError: If the endpoint can't be reached.
    """
    from topwork.clients.s3.storage import Storage, StorageSettings

    with ExitStack() as stack:
        if has_storage_configuration():
            settings = StorageSettings(attempts=OPTIONAL_ATTEMPTS, connect_timeout_seconds=OPTIONAL_CONNECT_SECONDS)
        elif state and (state / "data").is_dir():
            from topwork.local.server import embedded_storage

            settings = stack.enter_context(embedded_storage(state))
        else:
            yield None
            return
        storage = Storage(uri, settings)
        storage.check()
        yield storage


@contextmanager
def lock_scratch(state: Path, name: str) -> Iterator[Path]:
    """Lock the scratch directory of a run for this process.

    Args:
        state: State directory.
        name: Name of the run.

    Yields:
        The directory. It is deleted after success and kept after a failure, because it may contain a partial download.

    Raises:
        SettingError: If another process uses it.
    """
    scratch = state / "scratch" / name
    scratch.mkdir(parents=True, exist_ok=True)
    with (state / "scratch" / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingError(f"Another process on this machine is running {name}. Wait until it ends.") from error
        yield scratch
        shutil.rmtree(scratch, ignore_errors=True)
