"""Python processes that start with TensorFlow imported: forks of a server process that has imported it.

The import takes 5 of the 6 seconds of processor time that a small `topwork` process needs. A fork shares it, and has
its own main module, arguments, environment variables, output files, signals and exit code. TensorFlow starts its
threads at its first operation, so the server has no threads that a fork would lose; it checks this at its start.

The export check of such a process is another fork: `topwork.report.export_check.COMMAND` starts this file, which asks
the server for it and waits.

Tests start a new interpreter instead if they test the import itself, or what a process does before it.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any

PRELOADED = (
    "tensorflow",
    "keras",
    "tensorflow_datasets",
    "topwork.cli",
    "topwork.pipeline",
    "topwork.report.predictor",
)


class PreloadedProcess:
    """A running process, with methods of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.returncode: int | None = None
        self.pid = self._read_number(None)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._read_number(timeout)
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read_number(self, timeout: float | None) -> int:
        if not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        # Each number is one short message, which arrives as a whole.
        return int(self._connection.recv(32))


class PreloadedPython:
    """Starts processes as `python -m MODULE …` or `python -c CODE …` would."""

    def __init__(self, directory: Path) -> None:
        self._address = str(directory / "preloaded")
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # it would start threads when it is imported
        command = [sys.executable, __file__, self._address]
        self._server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._server.stdout
        assert self._server.stdout.readline() == b"ready\n"

    def close(self) -> None:
        self._server.communicate()

    def accepts(self, environment: Mapping[str, str]) -> bool:
        """Return whether a new interpreter with these variables would import the same modules as this one."""
        return environment.get("PYTHONPATH") == os.environ.get("PYTHONPATH")

    def start(
        self,
        arguments: Sequence[str | Path],
        *,
        stdout: IO[Any],
        stderr: IO[Any],
        env: Mapping[str, str] | None = None,
        cwd: str | Path = ".",
    ) -> PreloadedProcess:
        """Start a process with these arguments of Python; its standard input is empty."""
        environment = dict(os.environ if env is None else env)
        assert self.accepts(environment)
        with Path(os.devnull).open() as empty:
            return _start(self._address, [*map(str, arguments)], environment, cwd, (empty, stdout, stderr))

    def run(
        self,
        arguments: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = ".",
        timeout: float = 900,
    ) -> "subprocess.CompletedProcess[str]":
        """Start a process and wait until it exits."""
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            process = self.start(arguments, stdout=stdout, stderr=stderr, env=env, cwd=cwd)
            try:
                returncode = process.wait(timeout)
            finally:
                process.kill()
            output = [(file.seek(0), file.read().decode())[1] for file in (stdout, stderr)]
        return subprocess.CompletedProcess([*map(str, arguments)], returncode, *output)


def _start(
    address: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    directory: str | Path,
    files: Iterable[IO[Any]],
) -> PreloadedProcess:
    """Ask the server for a process with these standard files."""
    request = [arguments, environment, str(Path(directory).absolute())]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    socket.send_fds(connection, [json.dumps(request).encode()], [file.fileno() for file in files])
    return PreloadedProcess(connection)


def main() -> None:
    """Serve processes, or be one: with arguments after the address, start such a process and exit with its code."""
    address, *arguments = sys.argv[1:]
    if not arguments:
        _serve_until_end_of_input(address)
        return
    process = _start(address, arguments, dict(os.environ), ".", (sys.stdin, sys.stdout, sys.stderr))
    sys.exit(process.wait())


def _serve_until_end_of_input(address: str) -> None:
    """Import the libraries and fork a process for each request, until standard input is closed."""
    for name in PRELOADED:
        import_module(name)
    if Path("/proc/self/task").exists():
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "threads do not survive a fork"
    gc.collect()
    gc.freeze()  # forks do not traverse, and so copy, the memory of the libraries
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        os.write(1, b"ready\n")
        arguments = _serve(listener)
    if arguments:
        _run(arguments, address)


def _serve(listener: socket.socket) -> list[str] | None:
    """Return the arguments of the process in that process, and None in the server when it ends."""
    while listener in select.select([0, listener], [], [])[0]:
        connection, _ = listener.accept()
        with connection:
            message, descriptors, _, _ = socket.recv_fds(connection, 2**20, 3)
            # The parent of the process waits for its exit code, and the server for the next request.
            if os.fork() == 0 and (arguments := _fork(connection, message, descriptors)):
                return arguments
        for descriptor in descriptors:
            os.close(descriptor)
        _reap()
    return None


def _fork(connection: socket.socket, message: bytes, descriptors: list[int]) -> list[str]:
    """Fork the process, which returns its arguments. The parent reports its number and exit code, and exits."""
    arguments, environment, directory = json.loads(message)
    if pid := os.fork():
        for descriptor in (0, 1, 2, *descriptors):
            os.close(descriptor)
        connection.send(str(pid).encode())
        # The connection is readable when the other side has closed it: nobody waits for the process any more.
        if connection in select.select([os.pidfd_open(pid), connection], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with suppress(BrokenPipeError):
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    return list(arguments)


def _reap() -> None:
    """Collect the processes that have ended, so that their processor time counts."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _run(arguments: list[str], address: str) -> None:
    """Run a module or code like the interpreter."""
    import numpy as np

    from topwork.report import export_check

    # Without `site` and its packages, the process that asks the server starts in milliseconds.
    export_check.COMMAND = (sys.executable, "-I", "-S", __file__, address, *export_check.COMMAND[1:])
    np.random.seed()  # every fork starts with the same state
    option, program, *rest = arguments
    sys.argv = [option, *rest]
    sys.path[0] = str(Path.cwd()) if option == "-m" else ""
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        main_module = types.ModuleType("__main__")
        sys.modules["__main__"] = main_module
        exec(compile(program, "<string>", "exec"), main_module.__dict__)


if __name__ == "__main__":
    main()
