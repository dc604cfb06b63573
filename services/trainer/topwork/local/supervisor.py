"""Runs the embedded S3 server in a separate process while it has users. Imports only the standard library.

Files of the state directory:

    users.lock        shared lock of every user; an exclusive lock proves that there are no users
    start.lock        exclusive lock of the user that looks for the server or starts it
    server.lock       exclusive lock of supervisor and server; free if neither is running
    server.json       endpoint of the server that holds server.lock
    server.log        output of supervisor and server
    ports.json        ports of the last server, reused while they are free
    credentials.json  keys for the users  (mode 0600)
    s3.json           the same keys for the server  (mode 0600)
    security.toml     keys between the components of the server  (mode 0600)
    data/             the stored objects

The kernel releases the locks of a process however it ends, so no process ID needs to be stored or trusted.
"""

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

POLL_SECONDS = 0.25
# Killing the server loses no completed write, so there is no need to wait for it to close its connections.
STOP_TIMEOUT_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Detach from the calling process, then run the server: `supervisor.py STATE ENDPOINT COMMAND…`."""
    state, endpoint, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if os.fork():
        os._exit(0)
    # Ctrl-C interrupts the foreground process group, whose members still need storage for their last checkpoint.
    os.setsid()
    os.chdir(state)
    supervise(state, endpoint, command)


def supervise(state: Path, endpoint: str, command: list[str]) -> None:
    """Run the server until it has no users.

    Args:
        state: Directory of the embedded storage.
        endpoint: URL of the server.
        command: The server program and its arguments.
    """
    with (state / "server.lock").open("a") as server_lock, (state / "users.lock").open("a") as users:
        fcntl.flock(server_lock, fcntl.LOCK_EX)
        write_private_file(state / "server.json", json.dumps({"endpoint": endpoint}))
        # The server inherits the lock: while it is alive, no second server can open its data.
        server = subprocess.Popen(
            command,
            cwd=state,
            stdin=subprocess.DEVNULL,
            pass_fds=(server_lock.fileno(),),
            preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
        )
        stop_requests: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stop_requests.append(number))
        while server.poll() is None and not stop_requests and not lock_if_unused(users):
            time.sleep(POLL_SECONDS)
        stop(server)
        remove_sockets(command)
        (state / "server.json").unlink(missing_ok=True)


def lock_if_unused(users: IO[str]) -> bool:
    """Lock the users' lock exclusively if nobody holds it. A new user then waits until the server has stopped."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def stop(server: "subprocess.Popen[bytes]") -> None:
    """Terminate the server, and kill it if it does not exit in time."""
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def remove_sockets(command: list[str]) -> None:
    """Remove the Unix sockets that the server creates in /tmp for its gRPC ports."""
    for argument in command:
        name, _, port = argument.partition("=")
        if name.endswith(".port.grpc"):
            component = name.strip("-").partition(".")[0]
            Path(f"/tmp/seaweedfs-{component}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108


def die_with_parent() -> None:
    """Make the kernel kill this process when the supervisor dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def write_private_file(path: Path, text: str) -> None:
    """Write a file atomically, readable by its owner only."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


if __name__ == "__main__":
    main()
