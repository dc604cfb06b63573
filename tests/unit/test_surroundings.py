"""What the commands find in the environment."""

import subprocess
import sys
from pathlib import Path

import pytest

from topwork.cli.runtime.environment import default_state, has_own_storage


def test_the_state_folder_follows_its_variable_then_xdg_then_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_state({"TOPWORK_STATE": "/a", "XDG_STATE_HOME": "/b"}) == Path("/a")
    assert default_state({"XDG_STATE_HOME": "/b"}) == Path("/b/topwork")
    assert default_state({}) == Path("/home/ada/.local/state/topwork")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"])
def test_an_aws_variable_means_own_storage(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert has_own_storage({name: "x"})
    assert not has_own_storage({name: ""})


def test_an_aws_file_means_own_storage(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_own_storage({})
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").touch()
    assert has_own_storage({})


HUSHED = """
import os
from topwork.cli.runtime.environment import hushed
with hushed():
    os.write(2, b"start-up talk\\n")
    {then}
os.write(2, b"after\\n")
"""


def test_start_up_talk_is_dropped():
    ended = subprocess.run([sys.executable, "-c", HUSHED.format(then="")], capture_output=True, text=True, check=True)
    assert ended.stderr == "after\n"


def test_start_up_talk_is_shown_when_the_start_fails():
    script = HUSHED.format(then="raise ValueError('no library')")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stderr.startswith("start-up talk\n")
    assert "ValueError: no library" in ended.stderr


def test_much_start_up_talk_blocks_nothing():
    script = HUSHED.format(then="[os.write(2, b'x' * 1000) for _ in range(60)]")
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60)
