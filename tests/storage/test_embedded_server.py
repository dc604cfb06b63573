"""The embedded S3 server: shared by concurrent processes, stopped when the last one exits, with persistent data."""

import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from topwork.clients.s3.storage import Storage, StorageSettings, create_bucket
from topwork.errors import SettingError
from topwork.local import server, supervisor
from topwork.local.server import embedded_storage

USER_SCRIPT = """
import sys
from pathlib import Path
from topwork.local.server import embedded_storage
with embedded_storage(Path(sys.argv[1])) as settings:
    print(settings.endpoint_url, flush=True)
    sys.stdin.read()
"""


def start_user(state: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", USER_SCRIPT, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def find_processes(state: Path) -> dict[str, int]:
    """Return the process IDs of supervisor and server of a state directory, by name."""
    process_ids = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode().split("\0")
            is_inside = (process / "cwd").readlink() == state
        except OSError:
            continue
        if arguments[0].endswith("weed") and is_inside:
            process_ids["server"] = int(process.name)
        elif str(state) in arguments and any(item.endswith("supervisor.py") for item in arguments):
            process_ids["supervisor"] = int(process.name)
    return process_ids


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def open_storage(settings: StorageSettings) -> Storage:
    return Storage("s3://topwork-kept/prefix", settings)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, StorageSettings]]:
    """A state directory with a running server, and its settings."""
    state = tmp_path_factory.mktemp("embedded") / "state"
    with embedded_storage(state) as settings:
        yield state, settings


def test_data_persists_however_the_server_stops(state: Path) -> None:
    with embedded_storage(state) as settings:
        create_bucket(settings, "topwork-kept")
        create_bucket(settings, "topwork-kept")
        open_storage(settings).write("first", b"1" * 100_000)
        os.kill(find_processes(state)["server"], signal.SIGKILL)
        wait_for(lambda: find_processes(state) == {})
        # A second user starts the server again, at the same address, while this one is still active.
        with embedded_storage(state) as second_settings:
            assert second_settings == settings
            assert open_storage(settings).read("first") == b"1" * 100_000
            open_storage(settings).write("second", b"2")
    wait_for(lambda: find_processes(state) == {})

    # If the port is in use, the server starts at another address with the same data.
    port = int(str(settings.endpoint_url).rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), embedded_storage(state) as new_settings:
        assert new_settings.endpoint_url != settings.endpoint_url
        open_storage(new_settings).write("third", b"3")
        assert {item.key: open_storage(new_settings).read(item.key) for item in open_storage(new_settings).list()} == {
            "first": b"1" * 100_000,
            "second": b"2",
            "third": b"3",
        }
        os.kill(find_processes(state)["supervisor"], signal.SIGKILL)
        # The kernel kills the server together with its supervisor.
        wait_for(lambda: find_processes(state) == {})


def test_processes_share_one_server_until_the_last_one_ends(state: Path) -> None:
    users = [start_user(state) for _ in range(3)]
    endpoints = {user.stdout.readline() for user in users if user.stdout}
    assert len(endpoints) == 1
    processes = find_processes(state)
    assert sorted(processes) == ["server", "supervisor"]
    users[0].kill()
    users[0].communicate()
    users[1].communicate("")
    assert (users[0].returncode, users[1].returncode) == (-signal.SIGKILL, 0)
    time.sleep(3 * supervisor.POLL_SECONDS)
    assert find_processes(state) == processes
    users[2].kill()
    users[2].communicate()
    wait_for(lambda: find_processes(state) == {})


def test_server_is_not_interrupted_by_ctrl_c(running_server: tuple[Path, StorageSettings]) -> None:
    processes = find_processes(running_server[0])
    assert sorted(processes) == ["server", "supervisor"]
    for process in processes.values():
        assert os.getpgid(process) != os.getpgid(0)
        assert os.getsid(process) != os.getsid(0)


def test_files_with_secrets_are_readable_only_by_their_owner(running_server: tuple[Path, StorageSettings]) -> None:
    state, settings = running_server
    assert settings.secret_key
    secret_files = [path for path in state.glob("*") if path.is_file() and settings.secret_key in path.read_text()]
    assert sorted(path.name for path in secret_files) == ["credentials.json", "s3.json"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [*secret_files, state / "security.toml", state]}
    assert modes == {"credentials.json": 0o600, "s3.json": 0o600, "security.toml": 0o600, "state": 0o700}


def test_components_behind_s3_reject_requests_without_a_token(running_server: tuple[Path, StorageSettings]) -> None:
    state, settings = running_server
    create_bucket(settings, "topwork-kept")
    open_storage(settings).write("key", b"secret")
    port = json.loads((state / "ports.json").read_text())[server.PORT_OPTIONS.index("filer.port")]
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/buckets/topwork-kept/prefix/key")
        response = connection.getresponse()
        assert (response.status, b"secret" in response.read()) == (401, False)


def test_write_does_not_create_a_bucket(running_server: tuple[Path, StorageSettings]) -> None:
    with pytest.raises(SettingError, match="The bucket topwork-missing does not exist"):
        Storage("s3://topwork-missing", running_server[1]).write("key", b"x")


def test_failed_start_reports_the_last_log_lines(state: Path) -> None:
    (state / "data").mkdir(parents=True)
    (state / "data" / "filerldb2").write_text("a file where the server needs a directory")
    with pytest.raises(SettingError) as caught, embedded_storage(state):
        pass
    lines = str(caught.value).splitlines()
    assert lines[0] == f"The embedded S3 server exited during startup. The last lines of {state}/server.log:"
    assert "filerldb2" in "".join(lines[1:])
    wait_for(lambda: find_processes(state) == {})


def test_unusable_state_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(SettingError) as caught, embedded_storage(tmp_path / "file" / "state"):
        pass
    assert str(caught.value).startswith(
        f"The state directory {tmp_path}/file/state of the embedded S3 server can't be used: "
    )


def test_missing_server_program_is_reported_with_the_install_command(
    state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError) as caught, embedded_storage(state):
        pass
    assert str(caught.value) == (
        "No storage endpoint is set and the embedded S3 server is not installed. "
        "Set AWS_ENDPOINT_URL, or install the server: pip install 'topwork[local]'."
    )
