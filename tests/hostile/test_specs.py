"""Specs by the thousand, generated and mutated: each is a job, or problems with a place and a reason.

TOPWORK_LONG=1 tries 10,000 generated and 2,000 mutated ones; without it a few hundred are tried.
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
TEXTS.append((ROOT / "tests/unit/test_spec_good.yaml").read_text())

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**30, -(2**63), 0.0, 1e-5, 0.5, 1e308, [], {}, [[]], [{}],
    "", " ", "a", "yes", "null", "1", "1e-5", "train[:40%]", "train[", "train[:1%]+validation", "all", "head",
    "s3://bucket/a", "s3://", "s3://A/", "http://[", "https://h/a.zip", "https://u:p@h/a.zip", "file:///etc/passwd",
    "/tmp/a.csv", "../..", "Xception", "Xceptoin", "imagenet", "x" * 5000, "\u202e", "\x00", "\ud83d", "é" * 50,
    "${HOME}", "{{x}}", "!!python/object:os.system",
]  # fmt: skip


def known_keys() -> list[str]:
    found: set[str] = set()

    def gather(value: Any) -> None:
        if isinstance(value, dict):
            found.update(map(str, value))
            for inner in value.values():
                gather(inner)
        elif isinstance(value, list):
            for inner in value:
                gather(inner)

    for text in TEXTS:
        for document in YAML(typ="safe", pure=True).load_all(text):
            gather(document)
    return sorted(found)


def problems_of(text: str) -> tuple[str, ...]:
    """Read a spec; what is wrong must have a file, a place in it and a reason, each on one line."""
    try:
        assert read_text(text, "job.yaml")
    except InvalidSpecError as error:
        assert error.exit_code == 2
        assert error.problems
        lines = text.count("\n") + 2
        for problem in error.problems:
            assert problem.file == "job.yaml"
            assert 1 <= problem.line <= lines or "holds no job" in problem.message, problem
            assert len(problem.message) > 10, problem
            assert "\n" not in str(problem)
            assert not any(word in problem.message for word in ("Traceback", "pydantic", "<class"))
        return tuple(map(str, error.problems))
    return ()


def heap(chance: random.Random, keys: list[str], depth: int) -> Any:
    """Known keys and odd values, nested."""
    if depth == 0 or chance.random() < 0.3:
        return chance.choice(VALUES)
    if chance.random() < 0.2:
        return [heap(chance, keys, depth - 1) for _ in range(chance.randint(0, 3))]
    return {chance.choice([*keys, "x", ""]): heap(chance, keys, depth - 1) for _ in range(chance.randint(0, 5))}


def change(chance: random.Random, keys: list[str], place: Any) -> None:
    """Replace, add or take out something at any depth of a document."""
    inner = list(place) if isinstance(place, dict) else list(range(len(place)))
    if not inner:
        return
    key, action = chance.choice(inner), chance.random()
    if isinstance(place[key], dict | list) and chance.random() < 0.75:
        change(chance, keys, place[key])
    elif action < 0.6:
        place[key] = heap(chance, keys, 2)
    elif action < 0.8 and isinstance(place, dict):
        place[chance.choice([*keys, "x"])] = heap(chance, keys, 1)
    else:
        del place[key]


def generated(chance: random.Random, keys: list[str], documents: list[Any]) -> str:
    """A good spec of which up to 6 places hold something else, or a heap of known keys and odd values."""
    if chance.random() < 0.25:
        return json.dumps({"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "spec": heap(chance, keys, 4)})
    document = json.loads(json.dumps(chance.choice(documents)))
    for _ in range(chance.randint(1, 6)):
        change(chance, keys, document)
    return json.dumps(document, ensure_ascii=chance.random() < 0.5, indent=chance.choice([None, 1]))


def mutated(chance: random.Random) -> str:
    """A real spec with lines lost, doubled, moved or taken from another, and characters changed."""
    lines = chance.choice(TEXTS).splitlines()
    for _ in range(chance.randint(1, 5)):
        place, action = chance.randrange(len(lines)), chance.randrange(6)
        if action == 0:
            del lines[place]
            lines = lines or [""]
        elif action == 1:
            lines.insert(place, chance.choice(lines))
        elif action == 2:
            lines[place] = " " * chance.randint(0, 4) + lines[place].lstrip()
        elif action == 3:
            lines[place] = chance.choice(chance.choice(TEXTS).splitlines())
        elif action == 4:
            key = lines[place].partition(":")[0]
            lines[place] = f"{key}: {json.dumps(chance.choice(VALUES))}"
        else:
            at = chance.randint(0, len(lines[place]))
            lines[place] = lines[place][:at] + chance.choice("\t:-[]{}&*!|>'\"%@`#,\\ ~\x07é") + lines[place][at + 1 :]
    return "\n".join(lines)


def test_generated_specs_are_jobs_or_problems_with_a_place_and_a_reason():
    chance, keys = random.Random(1), known_keys()
    documents = [found for text in TEXTS for found in YAML(typ="safe", pure=True).load_all(text) if found]
    wrong = sum(bool(problems_of(generated(chance, keys, documents))) for _ in range(GENERATED))
    print(f"{GENERATED} generated specs: {wrong} refused, {GENERATED - wrong} jobs")
    assert wrong > GENERATED // 2


def test_mutated_specs_are_jobs_or_problems_with_a_place_and_a_reason():
    chance = random.Random(2)
    wrong = sum(bool(problems_of(mutated(chance))) for _ in range(MUTATED))
    print(f"{MUTATED} mutated specs: {wrong} refused, {MUTATED - wrong} jobs")
    assert wrong > MUTATED // 3


def test_the_command_ends_with_2_and_the_same_words(tmp_path, monkeypatch, capsys):
    chance = random.Random(3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["topwork", "validate", "job.yaml"])
    refused = 0
    for _ in range(200 if LONG else 10):
        text = mutated(chance)
        Path("job.yaml").write_text(text, errors="surrogatepass")
        expected = problems_of(text)
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert ended.value.code == (2 if expected else 0)
        if expected:
            refused += 1
            assert all(line.startswith("job.yaml") for line in said.err.splitlines())
            assert len(said.err.splitlines()) == len(expected)
    assert refused
