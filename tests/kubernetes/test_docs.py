"""The page for cluster users, and the README, name commands, options, files and keys that are there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML
from typer.exceptions import TyperException

from topwork import __version__
from topwork.cli import app
from topwork.spec.compute import Compute

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
README = (ROOT / "README.md").read_text()
FILES = ("docs", "examples", "k8s", "charts", "schema", "tests")


def console_lines(text: str) -> list[str]:
    """What a reader types, with lines that end in a backslash joined, without comments, and one command each."""
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    joined = [re.sub(r"\\\n\s*", "", block) for block in blocks]
    typed = [line.removeprefix("$ ") for block in joined for line in block.splitlines() if line.startswith("$ ")]
    return [part.strip() for line in typed for part in re.split(r"\s\|\s|\s&&\s", line.partition(" #")[0])]


def topwork_lines() -> list[str]:
    inline = re.findall(r"`(topwork [a-z][^`]*)`", PAGE)
    return sorted(
        {line for line in [*console_lines(PAGE), *console_lines(README), *inline] if line.startswith("topwork ")}
    )


def parse(line: str) -> None:
    """Parse a command line as `topwork` would, down to the command and all its options, without running it."""
    command: Any = typer.main.get_command(app)
    words, path = shlex.split(line)[1:], "topwork"
    context = command.make_context(path, [], resilient_parsing=True)
    while hasattr(command, "list_commands") and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        assert found, f"{line}: no command {words[0]}"
        command, path, words = found, f"{path} {words[0]}", words[1:]
        context = command.make_context(path, [], resilient_parsing=True)
    # A command that is only named in a sentence has no arguments.
    if words and words != ["--version"]:
        command.make_context(path, words)


def test_the_page_shows_commands():
    shown = {line.split()[1] for line in topwork_lines()}
    assert {"submit", "status", "list", "logs", "cancel", "render"} <= shown


@pytest.mark.parametrize("line", topwork_lines())
def test_every_command_line_parses(line):
    parse(line)


def test_a_command_line_that_is_wrong_is_found():
    with pytest.raises(TyperException, match="--folow"):
        parse("topwork submit job.yaml --folow")
    with pytest.raises(TyperException, match="transfr"):
        parse("topwork logs cats --stage transfr")
    with pytest.raises(AssertionError, match="no command summit"):
        parse("topwork summit job.yaml")


def test_every_file_that_is_named_is_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    named = re.findall(rf"(?<![\w/.:-])((?:{'|'.join(FILES)})/[\w./-]+)", PAGE)
    assert named
    assert [name for name in sorted(set(named)) if not (ROOT / name.rstrip(".")).exists()] == []


def test_every_make_target_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", PAGE)) | {
        line.split()[1] for line in console_lines(PAGE) if line.startswith("make ")
    }
    assert named - targets == set()


def test_every_key_of_compute_is_known():
    known = {field.alias for field in Compute.model_fields.values()} | set(Compute.model_fields)
    written = re.findall(r"`(?:spec\.)?compute\.(\w+)", PAGE)
    for snippet in re.findall(r"(compute: \{.*\})", PAGE):
        written += YAML(typ="safe").load(snippet)["compute"]
    assert written
    assert sorted(set(written) - known) == []


def test_snippets_of_compute_are_valid():
    for snippet in re.findall(r"(compute: \{.*\})", PAGE):
        Compute.model_validate(YAML(typ="safe").load(snippet)["compute"])


def spoken() -> str:
    """All that the code says: its string literals with what is filled in as an ellipsis, joined where they go on."""
    text = "\n".join(path.read_text() for path in (ROOT / "services").rglob("*.py"))
    joined = re.sub(r"\"\s*\n\s*f?\"", "", text)
    return re.sub(r"\{[^{}]*\}", "…", joined)


def symptoms() -> list[str]:
    """What stands in the first column of the tables of troubleshooting."""
    rows = re.findall(r"^\| (.*?) \|", PAGE.partition("## Troubleshooting")[2], flags=re.MULTILINE)
    return [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]


def test_troubleshooting_quotes_what_the_commands_say():
    said = spoken()
    parts = [part.strip() for phrase in symptoms() for part in phrase.split("…") if len(part.strip()) > 3]
    assert len(parts) > 25
    assert [part for part in parts if part not in said] == []


def test_versions_are_the_current_one():
    named = re.findall(r"topwork:([0-9][\w.]*)-(?:cpu|gpu)", PAGE)
    assert named
    assert set(named) == {__version__}
