"""Fuzzing of the spec loader: every spec results in jobs, or in problems with a position and a reason.

With TOPWORK_LONG=1 these tests use 10,000 generated and 2,000 mutated specs instead of a few hundred.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from topwork.cli import main
from topwork.spec.loading.loader import read_text
from topwork.spec.loading.problems import InvalidSpecError

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("TOPWORK_LONG") == "1"
GENERATED, MUTATED = (10_000, 2_000) if LONG else (150, 100)
TEXTS = [path.read_text() for path in sorted(ROOT.glob("examples/*.yaml"))]
TEXTS.append((ROOT / "tests/unit/valid_spec.yaml").read_text())

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**30, -(2**63), 0.0, 1e-5, 0.5, 1e308, [], {}, [[]], [{}],
    "", " ", "a", "yes", "null", "1", "1e-5", "train[:40%]", "train[", "train[:1%]+validation", "all", "head",
    "s3://bucket/a", "s3://", "s3://A/", "http://[", "https://h/a.zip", "https://u:p@h/a.zip", "file:///etc/passwd",
    "/tmp/a.csv", "../..", "Xception", "Xceptoin", "imagenet", "x" * 5000, "\u202e", "\x00", "\ud83d", "é" * 50,
    "${HOME}", "{{x}}", "!!python/object:os.system",
]  # fmt: skip


def known_keys() -> list[str]:
    keys: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            keys.update(map(str, value))
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)

    for text in TEXTS:
        for document in YAML(typ="safe", pure=True).load_all(text):
            collect(document)
    return sorted(keys)


def problems_of(text: str) -> tuple[str, ...]:
    """Read a spec and return its problems. Each must fit on one line and have a file, position and reason."""
    try:
        assert read_text(text, "job.yaml")
    except InvalidSpecError as error:
        assert error.exit_code == 2
        assert error.problems
        lines = text.count("\n") + 2
        for problem in error.problems:
            assert problem.file == "job.yaml"
            assert 1 <= problem.line <= lines or "contains no job" in problem.message, problem
            assert len(problem.message) > 10, problem
            assert "\n" not in str(problem)
            assert not any(word in problem.message for word in ("Traceback", "pydantic", "<class"))
        return tuple(map(str, error.problems))
    return ()


def random_value(rng: random.Random, keys: list[str], depth: int) -> Any:
    """Generate a nested value of known keys and unusual values."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(VALUES)
    if rng.random() < 0.2:
        return [random_value(rng, keys, depth - 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice([*keys, "x", ""]): random_value(rng, keys, depth - 1) for _ in range(rng.randint(0, 5))}


def mutate(rng: random.Random, keys: list[str], node: Any) -> None:
    """Replace, add or remove a value at a random depth of a document."""
    inner = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not inner:
        return
    key, action = rng.choice(inner), rng.random()
    if isinstance(node[key], dict | list) and rng.random() < 0.75:
        mutate(rng, keys, node[key])
    elif action < 0.6:
        node[key] = random_value(rng, keys, 2)
    elif action < 0.8 and isinstance(node, dict):
        node[rng.choice([*keys, "x"])] = random_value(rng, keys, 1)
    else:
        del node[key]


def generate_spec(rng: random.Random, keys: list[str], documents: list[Any]) -> str:
    """Generate a valid spec with up to 6 changes, or a random nesting of known keys and unusual values."""
    if rng.random() < 0.25:
        spec = random_value(rng, keys, 4)
        return json.dumps({"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "spec": spec})
    document = json.loads(json.dumps(rng.choice(documents)))
    for _ in range(rng.randint(1, 6)):
        mutate(rng, keys, document)
    return json.dumps(document, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))


def mutate_lines(rng: random.Random) -> str:
    """Take a real spec and remove, repeat, indent or replace some lines and characters."""
    lines = rng.choice(TEXTS).splitlines()
    for _ in range(rng.randint(1, 5)):
        index, action = rng.randrange(len(lines)), rng.randrange(6)
        if action == 0:
            del lines[index]
            lines = lines or [""]
        elif action == 1:
            lines.insert(index, rng.choice(lines))
        elif action == 2:
            lines[index] = " " * rng.randint(0, 4) + lines[index].lstrip()
        elif action == 3:
            lines[index] = rng.choice(rng.choice(TEXTS).splitlines())
        elif action == 4:
            key = lines[index].partition(":")[0]
            lines[index] = f"{key}: {json.dumps(rng.choice(VALUES))}"
        else:
            at = rng.randint(0, len(lines[index]))
            lines[index] = lines[index][:at] + rng.choice("\t:-[]{}&*!|>'\"%@`#,\\ ~\x07é") + lines[index][at + 1 :]
    return "\n".join(lines)


def test_generated_specs_result_in_jobs_or_problems():
    rng, keys = random.Random(1), known_keys()
    documents = [document for text in TEXTS for document in YAML(typ="safe", pure=True).load_all(text) if document]
    rejected = sum(bool(problems_of(generate_spec(rng, keys, documents))) for _ in range(GENERATED))
    print(f"{GENERATED} generated specs: {rejected} rejected, {GENERATED - rejected} accepted")
    assert rejected > GENERATED // 2


def test_mutated_specs_result_in_jobs_or_problems():
    rng = random.Random(2)
    rejected = sum(bool(problems_of(mutate_lines(rng))) for _ in range(MUTATED))
    print(f"{MUTATED} mutated specs: {rejected} rejected, {MUTATED - rejected} accepted")
    assert rejected > MUTATED // 3


def test_validate_exits_with_code_2_and_the_same_messages(tmp_path, monkeypatch, capsys):
    rng = random.Random(3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["topwork", "validate", "job.yaml"])
    rejected = 0
    for _ in range(200 if LONG else 10):
        text = mutate_lines(rng)
        Path("job.yaml").write_text(text, errors="surrogatepass")
        expected = problems_of(text)
        with pytest.raises(SystemExit) as caught:
            main()
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        assert caught.value.code == (2 if expected else 0)
        if expected:
            rejected += 1
            assert all(line.startswith("job.yaml") for line in output.err.splitlines())
            assert len(output.err.splitlines()) == len(expected)
    assert rejected
