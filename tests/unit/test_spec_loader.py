"""Files and texts of every sort: jobs, or problems, and never anything else."""

import io
import sys
from pathlib import Path

import pytest

from topwork.spec.loading.loader import MAX_BYTES, read_bytes, read_files, read_jobs, read_text
from topwork.spec.loading.problems import InvalidSpecError, Problem

GOOD = Path(__file__).with_name("test_spec_good.yaml").read_text(encoding="utf-8")


def told(text: str) -> list[str]:
    with pytest.raises(InvalidSpecError) as caught:
        read_text(text, "job.yaml")
    return [str(problem) for problem in caught.value.problems]


def told_of(path: Path) -> list[str]:
    with pytest.raises(InvalidSpecError) as caught:
        read_jobs(path)
    assert caught.value.exit_code == 2
    return [str(problem).replace(str(path), "job.yaml") for problem in caught.value.problems]


def test_reading_gives_the_jobs_of_all_documents_in_order() -> None:
    second = GOOD.replace("name: cats-vs-dogs\n", "name: second\n", 1)
    jobs = read_text(f"---\n{GOOD}---\n# nothing\n---\n{second}...\n", "job.yaml")
    assert [job.metadata.name for job in jobs] == ["cats-vs-dogs", "second"]


def test_reading_tells_the_problems_of_all_documents_at_once() -> None:
    text = f"{GOOD.replace('seed: 42', 'seed: a')}---\n{GOOD}---\n{GOOD.replace('seed: 42', 'sede: 1')}---\n]"
    assert [(line.split(" ")[0], line.split(" ")[1]) for line in told(text)] == [
        ("job.yaml:51:9:", "spec.seed:"),
        ("job.yaml:155:3:", "spec.sede:"),
        ("job.yaml:157:1:", "is"),
    ]


def test_reading_tells_the_problems_of_all_files_at_once(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(GOOD.replace("seed: 42", "seed: a"))
    two.write_text(GOOD.replace("gpus: 2", "gpus: 99"))
    with pytest.raises(InvalidSpecError) as caught:
        read_files([one, tmp_path / "three.yaml", two])
    assert [(problem.file, problem.line) for problem in caught.value.problems] == [
        (str(one), 51),
        (str(tmp_path / "three.yaml"), 0),
        (str(two), 44),
    ]


def test_reading_takes_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"seed: 1")))
    with pytest.raises(InvalidSpecError) as caught:
        read_jobs(Path("-"))
    assert {problem.file for problem in caught.value.problems} == {"standard input"}


def test_problem_keeps_its_parts() -> None:
    with pytest.raises(InvalidSpecError) as caught:
        read_text(GOOD.replace("gpus: 2", "gpus: 99"), "job.yaml")
    assert caught.value.problems == (
        Problem("job.yaml", 44, 11, "spec.compute.gpus", "99 is not allowed. Allowed: a whole number from 0 to 16."),
    )


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_reading_takes_byte_order_marks_and_line_breaks_of_windows(mark: str, line_break: str) -> None:
    assert len(read_bytes((mark + GOOD.replace("\n", line_break)).encode(), "job.yaml")) == 1


@pytest.mark.parametrize(
    ("written", "rate"), [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("1", 1.0), ("+.5", 0.5), ("0.000_5", 5e-4), ("0x1", 1.0)]
)
def test_numbers_are_those_of_yaml_1_2(written: str, rate: float) -> None:
    (job,) = read_text(GOOD.replace("learningRate: 0.001", f"learningRate: {written}"), "job.yaml")
    assert job.spec.transfer.optimizer.learning_rate == rate


@pytest.mark.parametrize("word", ["yes", "No", "on", "off", "y"])
def test_words_are_no_booleans(word: str) -> None:
    (job,) = read_text(GOOD.replace("{team: vision}", f"{{team: {word}, {word}: a}}"), "job.yaml")
    assert job.metadata.labels == {"team": word, word: "a"}


def test_anchors_and_aliases_may_save_writing() -> None:
    text = GOOD.replace("{name: adam, learningRate: 0.001}", "&adam {name: adam, learningRate: 0.001}")
    (job,) = read_text(text.replace("{name: adam, learningRate: 1.0e-5}", "*adam"), "job.yaml")
    assert job.spec.fine_tune
    assert job.spec.fine_tune.optimizer == job.spec.transfer.optimizer


def test_missing_file_is_told(tmp_path: Path) -> None:
    assert told_of(tmp_path / "none.yaml") == ["job.yaml: is not there. Check the path."]


def test_folder_is_told(tmp_path: Path) -> None:
    assert told_of(tmp_path) == ["job.yaml: is a folder. Name the YAML files in it."]


def test_path_through_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert told_of(tmp_path / "file" / "job.yaml") == ["job.yaml: can't be read: Not a directory."]


def test_path_that_no_system_takes_is_told() -> None:
    with pytest.raises(InvalidSpecError, match="can't be read: embedded null byte"):
        read_jobs(Path("a\0b"))


def test_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("# only a comment\n---\n")
    assert told_of(tmp_path / "job.yaml") == [
        "job.yaml: holds no job. A spec begins with apiVersion: topwork.dev/v1alpha1."
    ]


def test_binary_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert told_of(tmp_path / "job.yaml") == [
        "job.yaml:1:1: the byte 0x89 is no UTF-8. Is this a YAML file? If so, save it as UTF-8."
    ]


def test_wrong_byte_is_told_with_its_place() -> None:
    with pytest.raises(InvalidSpecError) as caught:
        read_bytes("kind: a\nname: é".encode() + b"\xff", "job.yaml")
    assert [(problem.line, problem.column) for problem in caught.value.problems] == [(2, 8)]


def test_utf_16_is_told(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD, encoding="utf-16")
    assert told_of(tmp_path / "job.yaml") == ["job.yaml: is UTF-16. Save it as UTF-8."]


def test_huge_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    assert told_of(tmp_path / "job.yaml") == ["job.yaml: holds more than 1048576 bytes, which no spec does."]


def test_large_text_is_told() -> None:
    assert told("#" * 262_145) == [
        "job.yaml:1:1: the file holds 262145 characters, more than the 262144 that a spec may have."
    ]


@pytest.mark.parametrize(
    ("text", "shown"), [("- a\n- b\n", "a list of 2"), ("job", '"job"'), ("42", "42"), ("true", "true")]
)
def test_document_that_is_no_mapping_is_told(text: str, shown: str) -> None:
    assert told(text) == [f"job.yaml:1:1: {shown} is no job. A job is a mapping that begins with apiVersion."]


def test_alias_bomb_is_told() -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{level}: &a{level + 1} [{', '.join([f'*a{level}'] * 9)}]" for level in range(8)]
    (line,) = told("\n".join(lines))
    assert line.endswith("the document holds more than 20000 values, repeated aliases counted each time.")


@pytest.mark.parametrize("depth", [65, 1_000])
def test_deep_nesting_is_told(depth: int) -> None:
    (line,) = told("a: " + "[" * depth + "]" * depth)
    assert line.endswith("the document is nested more than 64 levels deep.")


def test_key_of_yaml_merging_names_its_line() -> None:
    line = "job.yaml:3:3: c.<<: the merge key << is no part of YAML 1.2. Write the keys out."
    assert line in told("a: &a {b: 1}\nc:\n  <<: *a\n")


def test_snake_case_is_for_python_only() -> None:
    assert told(GOOD.replace("apiVersion:", "api_version:")) == [
        "job.yaml:2:1: apiVersion: missing. Version of this format. Allowed: topwork.dev/v1alpha1.",
        "job.yaml:2:1: api_version: no such key. Did you mean apiVersion? Known: apiVersion, kind, metadata, spec.",
    ]
