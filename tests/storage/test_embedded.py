"""The embedded server: shared by all who use it at once, gone after the last, its data kept through any end."""

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

from topwork.clients.s3.storage import Storage, StorageSettings, make_bucket
from topwork.errors import SettingError
from topwork.local import server, supervisor
from topwork.local.server import embedded_storage

USER = """
import sys
from pathlib import Path
from topwork.local.server import embedded_storage
with embedded_storage(Path(sys.argv[1])) as settings:
    print(settings.endpoint_url, flush=True)
    sys.stdin.read()
"""


def start_user(state: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", USER, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def processes_of(state: Path) -> dict[str, int]:
    """Process ids of supervisor and server of a state folder, by their names."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            inside = (process / "cwd").readlink() == state
        except OSError:
            continue
        if words[0].endswith("weed") and inside:
            found["server"] = int(process.name)
        elif str(state) in words and any(word.endswith("supervisor.py") for word in words):
            found["supervisor"] = int(process.name)
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def stored(settings: StorageSettings) -> Storage:
    return Storage("s3://topwork-kept/place", settings)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, StorageSettings]]:
    """A state folder whose server runs."""
    state = tmp_path_factory.mktemp("embedded") / "state"
    with embedded_storage(state) as settings:
        yield state, settings


def test_data_outlive_the_server_however_it_ended(state: Path) -> None:
    with embedded_storage(state) as settings:
        make_bucket(settings, "topwork-kept")
        make_bucket(settings, "topwork-kept")
        stored(settings).write("first", b"1" * 100_000)
        os.kill(processes_of(state)["server"], signal.SIGKILL)
        wait_for(lambda: processes_of(state) == {})
        # Another user, while this one still holds its share: the same address serves both again.
        with embedded_storage(state) as again:
            assert again == settings
            assert stored(settings).read("first") == b"1" * 100_000
            stored(settings).write("second", b"2")
    wait_for(lambda: processes_of(state) == {})

    # Its port is taken meanwhile: another address, the same data.
    port = int(str(settings.endpoint_url).rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), embedded_storage(state) as moved:
        assert moved.endpoint_url != settings.endpoint_url
        stored(moved).write("third", b"3")
        assert {found.key: stored(moved).read(found.key) for found in stored(moved).list()} == {
            "first": b"1" * 100_000,
            "second": b"2",
            "third": b"3",
        }
        os.kill(processes_of(state)["supervisor"], signal.SIGKILL)
        # The kernel takes the server down with its supervisor: nothing is left without a keeper.
        wait_for(lambda: processes_of(state) == {})


def test_processes_share_one_server_until_the_last_has_ended_in_whatever_way(state: Path) -> None:
    users = [start_user(state) for _ in range(3)]
    endpoints = {user.stdout.readline() for user in users if user.stdout}
    assert len(endpoints) == 1
    running = processes_of(state)
    assert sorted(running) == ["server", "supervisor"]
    users[0].kill()
    users[0].communicate()
    users[1].communicate("")
    assert (users[0].returncode, users[1].returncode) == (-signal.SIGKILL, 0)
    time.sleep(3 * supervisor.POLL_SECONDS)
    assert processes_of(state) == running
    users[2].kill()
    users[2].communicate()
    wait_for(lambda: processes_of(state) == {})


def test_the_server_survives_an_interrupt_of_the_terminal(running: tuple[Path, StorageSettings]) -> None:
    processes = processes_of(running[0])
    assert sorted(processes) == ["server", "supervisor"]
    for process in processes.values():
        assert os.getpgid(process) != os.getpgid(0)
        assert os.getsid(process) != os.getsid(0)


def test_secrets_are_readable_by_their_owner_only(running: tuple[Path, StorageSettings]) -> None:
    state, settings = running
    assert settings.secret_key
    holding = [path for path in state.glob("*") if path.is_file() and settings.secret_key in path.read_text()]
    assert sorted(path.name for path in holding) == ["credentials.json", "s3.json"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [*holding, state / "security.toml", state]}
    assert modes == {"credentials.json": 0o600, "s3.json": 0o600, "security.toml": 0o600, "state": 0o700}


def test_the_parts_behind_s3_refuse_who_has_no_key(running: tuple[Path, StorageSettings]) -> None:
    state, settings = running
    make_bucket(settings, "topwork-kept")
    stored(settings).write("key", b"secret")
    port = json.loads((state / "ports.json").read_text())[server.LISTENERS.index("filer.port")]
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/buckets/topwork-kept/place/key")
        answer = connection.getresponse()
        assert (answer.status, b"secret" in answer.read()) == (401, False)


def test_a_bucket_is_never_made_by_a_write(running: tuple[Path, StorageSettings]) -> None:
    with pytest.raises(SettingError, match="The bucket topwork-missing does not exist"):
        Storage("s3://topwork-missing", running[1]).write("key", b"x")


def test_a_server_that_cannot_start_tells_the_end_of_its_log(state: Path) -> None:
    (state / "data").mkdir(parents=True)
    (state / "data" / "filerldb2").write_text("a file where the server needs a folder")
    with pytest.raises(SettingError) as caught, embedded_storage(state):
        pass
    lines = str(caught.value).splitlines()
    assert lines[0] == f"The embedded S3 server ended as soon as it was started. The end of {state}/server.log:"
    assert "filerldb2" in "".join(lines[1:])
    wait_for(lambda: processes_of(state) == {})


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SettingError) as caught, embedded_storage(tmp_path / "file" / "state"):
        pass
    assert str(caught.value).startswith(f"The folder {tmp_path}/file/state of the embedded S3 server can't be used: ")


def test_a_missing_server_program_tells_how_to_install_it(
    state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError) as caught, embedded_storage(state):
        pass
    assert str(caught.value) == (
        "No storage endpoint is set and the embedded S3 server is not installed. "
        "Set AWS_ENDPOINT_URL, or install it: pip install 'topwork[local]'."
    )
