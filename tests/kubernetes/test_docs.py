"""docs/cluster.md and the README refer only to commands, options, files and keys that exist."""

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from cel_expr_python import cel
from ruamel.yaml import YAML
from typer.exceptions import TyperException

from topwork import __version__
from topwork.cli import app
from topwork.cluster.transfer_job_status import State
from topwork.spec.compute import Compute

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
README = (ROOT / "README.md").read_text()
FILES = ("docs", "examples", "k8s", "charts", "schema", "tests")


def console_lines(text: str) -> list[str]:
    """Return the commands in console blocks: continuation lines joined, comments removed, pipelines split."""
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    joined = [re.sub(r"\\\n\s*", "", block) for block in blocks]
    commands = [line.removeprefix("$ ") for block in joined for line in block.splitlines() if line.startswith("$ ")]
    return [part.strip() for line in commands for part in re.split(r"\s\|\s|\s&&\s", line.partition(" #")[0])]


def topwork_lines() -> list[str]:
    inline = re.findall(r"`(topwork [a-z][^`]*)`", PAGE)
    return sorted(
        {line for line in [*console_lines(PAGE), *console_lines(README), *inline] if line.startswith("topwork ")}
    )


def parse_command_line(line: str) -> None:
    """Parse a command line with all its options, as `topwork` does, without running it."""
    command: Any = typer.main.get_command(app)
    words, path = shlex.split(line)[1:], "topwork"
    context = command.make_context(path, [], resilient_parsing=True)
    while hasattr(command, "list_commands") and words and not words[0].startswith("-"):
        if path == "topwork search" and words[0] not in command.commands:
            words = ["run", *words]  # the short form
        subcommand = command.get_command(context, words[0])
        assert subcommand, f"{line}: no command {words[0]}"
        command, path, words = subcommand, f"{path} {words[0]}", words[1:]
        context = command.make_context(path, [], resilient_parsing=True)
    # Commands that are only mentioned in a sentence have no arguments.
    if words and words != ["--version"]:
        command.make_context(path, words)


def test_page_shows_the_cluster_commands():
    shown = {line.split()[1] for line in topwork_lines()}
    assert {"submit", "status", "list", "logs", "cancel", "render"} <= shown


@pytest.mark.parametrize("line", topwork_lines())
def test_every_command_line_parses(line):
    parse_command_line(line)


def test_invalid_command_lines_are_detected():
    with pytest.raises(TyperException, match="--folow"):
        parse_command_line("topwork submit job.yaml --folow")
    with pytest.raises(TyperException, match="transfr"):
        parse_command_line("topwork logs cats --stage transfr")
    with pytest.raises(AssertionError, match="no command summit"):
        parse_command_line("topwork summit job.yaml")


def test_every_mentioned_file_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    mentioned = re.findall(rf"(?<![\w/.:-])((?:{'|'.join(FILES)})/[\w./-]+)", PAGE)
    assert mentioned
    assert [name for name in sorted(set(mentioned)) if not (ROOT / name.rstrip(".")).exists()] == []


def test_every_mentioned_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    mentioned = set(re.findall(r"`make ([a-z-]+)", PAGE)) | {
        line.split()[1] for line in console_lines(PAGE) if line.startswith("make ")
    }
    assert mentioned - targets == set()


def test_every_mentioned_key_of_compute_exists():
    known = {field.alias for field in Compute.model_fields.values()} | set(Compute.model_fields)
    mentioned = re.findall(r"`(?:spec\.)?compute\.(\w+)", PAGE)
    for snippet in re.findall(r"(compute: \{.*\})", PAGE):
        mentioned += YAML(typ="safe").load(snippet)["compute"]
    assert mentioned
    assert sorted(set(mentioned) - known) == []


def test_compute_snippets_are_valid():
    for snippet in re.findall(r"(compute: \{.*\})", PAGE):
        Compute.model_validate(YAML(typ="safe").load(snippet)["compute"])


def source_messages() -> str:
    """Return the source code with adjacent string literals joined, and replacement fields as an ellipsis."""
    text = "\n".join(path.read_text() for path in (ROOT / "services").rglob("*.py"))
    joined = re.sub(r"\"\s*\n\s*f?\"", "", text)
    # A replacement field is on one line; a dict literal that spans lines is not one.
    return re.sub(r"\{[^{}\n]*\}", "…", joined)


def quoted_messages() -> list[str]:
    """Return the quoted messages in the first column of the troubleshooting tables."""
    rows = re.findall(r"^\| (.*?) \|", PAGE.partition("## Troubleshooting")[2], flags=re.MULTILINE)
    return [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]


def test_troubleshooting_quotes_actual_messages():
    messages = source_messages()
    parts = [part.strip() for phrase in quoted_messages() for part in phrase.split("…") if len(part.strip()) > 3]
    assert len(parts) > 25
    assert [part for part in parts if part not in messages] == []


def test_mentioned_versions_are_current():
    mentioned = re.findall(r"topwork:([0-9][\w.]*)-(?:cpu|gpu)", PAGE)
    assert mentioned
    assert set(mentioned) == {__version__}


def health_of(status: dict[str, Any]) -> list[str]:
    """Return the health that Flux computes with the documented expressions."""
    snippet = PAGE.partition("healthCheckExprs:\n")[2].partition("```")[0]
    (check,) = YAML(typ="safe").load(snippet)
    environment = cel.NewEnv(variables={"metadata": cel.Type.DYN, "status": cel.Type.DYN})
    data = {"metadata": {"generation": 2}, "status": status}
    health = ("inProgress", "failed", "current")
    return [name for name in health if environment.compile(check[name]).eval(data=data).value() is True]


def test_flux_computes_the_health_of_a_transfer_job():
    assert health_of({}) == ["inProgress"]
    assert health_of({"observedGeneration": 1, "state": "Complete"})[0] == "inProgress"
    assert {state: health_of({"observedGeneration": 2, "state": state}) for state in get_args(State)} == {
        "Pending": ["inProgress"],
        "Running": ["inProgress"],
        "Suspended": ["inProgress"],
        "Complete": ["current"],
        "Failed": ["failed"],
        "Cancelled": ["failed"],
    }
