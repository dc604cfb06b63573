"""Runs the embedded server for as long as somebody uses it: a process of its own, of the standard library alone.

    state/
      users.lock        shared lock of every user; who gets it exclusively knows that nobody is left
      start.lock        exclusive lock of the user that looks for the server or starts it
      server.lock       exclusive lock of supervisor and server; free means that neither runs
      server.json       endpoint of the server that holds server.lock
      server.log        what supervisor and server say
      ports.json        ports of the last server, taken again while they are free
      credentials.json  keys for the users            (0600)
      s3.json           the same keys for the server  (0600)
      security.toml     keys between the parts of the server  (0600)
      data/             the objects

The kernel drops the locks of a process that dies in whatever way, so no process id is ever kept or trusted.
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
# A kill loses no completed write, so a server that is slow to close its connections is not waited for.
STOP_SECONDS = 0.5
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def main() -> None:
    """Detach, then run the server: `supervisor.py STATE ENDPOINT COMMAND…`."""
    state, endpoint, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if os.fork():
        os._exit(0)
    # A Ctrl-C reaches the whole foreground process group: the users still need storage for their last checkpoint.
    os.setsid()
    os.chdir(state)
    supervise(state, endpoint, command)


def supervise(state: Path, endpoint: str, command: list[str]) -> None:
    """Run the server until nobody uses it.

    Args:
        state: Folder of the embedded storage.
        endpoint: URL at which the server will answer.
        command: The server and its arguments.
    """
    with (state / "server.lock").open("a") as held, (state / "users.lock").open("a") as users:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_whole(state / "server.json", json.dumps({"endpoint": endpoint}))
        # The server inherits the lock: as long as it lives, in whatever way, no second one opens its data.
        server = subprocess.Popen(
            command,
            cwd=state,
            stdin=subprocess.DEVNULL,
            pass_fds=(held.fileno(),),
            preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
        )
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        while server.poll() is None and not stopped and not is_free(users):
            time.sleep(POLL_SECONDS)
        stop(server)
        remove_sockets(command)
        (state / "server.json").unlink(missing_ok=True)


def is_free(users: IO[str]) -> bool:
    """Take the users' lock if nobody holds it, and keep it: a new user then waits for the end."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def stop(server: "subprocess.Popen[bytes]") -> None:
    """Stop the server, kindly at first."""
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def remove_sockets(command: list[str]) -> None:
    """Remove the Unix sockets that the server makes beside its ports, at a place of its own choice."""
    for argument in command:
        name, _, port = argument.partition("=")
        if name.endswith(".port.grpc"):
            part = name.strip("-").partition(".")[0]
            Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108


def die_with_parent() -> None:
    """Let the kernel kill this process when the supervisor dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def write_whole(path: Path, text: str) -> None:
    """Write a file that only its owner reads and that is never seen half-written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


if __name__ == "__main__":
    main()
