"""Reading specs: every file or text results in jobs or in a list of problems."""

import io
import sys
from pathlib import Path

import pytest

from topwork.spec.loading.loader import MAX_BYTES, read_bytes, read_files, read_jobs, read_text
from topwork.spec.loading.problems import InvalidSpecError, Problem

VALID = Path(__file__).with_name("valid_spec.yaml").read_text(encoding="utf-8")


def problems_in(text: str) -> list[str]:
    with pytest.raises(InvalidSpecError) as caught:
        read_text(text, "job.yaml")
    return [str(problem) for problem in caught.value.problems]


def problems_in_file(path: Path) -> list[str]:
    with pytest.raises(InvalidSpecError) as caught:
        read_jobs(path)
    assert caught.value.exit_code == 2
    return [str(problem).replace(str(path), "job.yaml") for problem in caught.value.problems]


def test_read_text_returns_the_jobs_of_all_documents_in_order() -> None:
    second = VALID.replace("name: cats-vs-dogs\n", "name: second\n", 1)
    jobs = read_text(f"---\n{VALID}---\n# empty\n---\n{second}...\n", "job.yaml")
    assert [job.metadata.name for job in jobs] == ["cats-vs-dogs", "second"]


def test_read_text_reports_the_problems_of_all_documents() -> None:
    text = f"{VALID.replace('seed: 42', 'seed: a')}---\n{VALID}---\n{VALID.replace('seed: 42', 'sede: 1')}---\n]"
    assert [(line.split(" ")[0], line.split(" ")[1]) for line in problems_in(text)] == [
        ("job.yaml:51:9:", "spec.seed:"),
        ("job.yaml:155:3:", "spec.sede:"),
        ("job.yaml:157:1:", "is"),
    ]


def test_read_files_reports_the_problems_of_all_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(VALID.replace("seed: 42", "seed: a"))
    two.write_text(VALID.replace("gpus: 2", "gpus: 99"))
    with pytest.raises(InvalidSpecError) as caught:
        read_files([one, tmp_path / "three.yaml", two])
    assert [(problem.file, problem.line) for problem in caught.value.problems] == [
        (str(one), 51),
        (str(tmp_path / "three.yaml"), 0),
        (str(two), 44),
    ]


def test_read_jobs_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"seed: 1")))
    with pytest.raises(InvalidSpecError) as caught:
        read_jobs(Path("-"))
    assert {problem.file for problem in caught.value.problems} == {"standard input"}


def test_problem_has_file_position_path_and_message() -> None:
    with pytest.raises(InvalidSpecError) as caught:
        read_text(VALID.replace("gpus: 2", "gpus: 99"), "job.yaml")
    assert caught.value.problems == (
        Problem("job.yaml", 44, 11, "spec.compute.gpus", "99 is not allowed. Allowed: an integer from 0 to 16."),
    )


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_read_bytes_accepts_byte_order_marks_and_windows_line_breaks(mark: str, line_break: str) -> None:
    assert len(read_bytes((mark + VALID.replace("\n", line_break)).encode(), "job.yaml")) == 1


@pytest.mark.parametrize(
    ("written", "rate"), [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("1", 1.0), ("+.5", 0.5), ("0.000_5", 5e-4), ("0x1", 1.0)]
)
def test_numbers_follow_yaml_1_2(written: str, rate: float) -> None:
    (job,) = read_text(VALID.replace("learningRate: 0.001", f"learningRate: {written}"), "job.yaml")
    assert job.spec.transfer.optimizer.learning_rate == rate


@pytest.mark.parametrize("word", ["yes", "No", "on", "off", "y"])
def test_yaml_1_1_booleans_are_strings(word: str) -> None:
    (job,) = read_text(VALID.replace("{team: vision}", f"{{team: {word}, {word}: a}}"), "job.yaml")
    assert job.metadata.labels == {"team": word, word: "a"}


def test_anchors_and_aliases_are_supported() -> None:
    text = VALID.replace("{name: adam, learningRate: 0.001}", "&adam {name: adam, learningRate: 0.001}")
    (job,) = read_text(text.replace("{name: adam, learningRate: 1.0e-5}", "*adam"), "job.yaml")
    assert job.spec.fine_tune
    assert job.spec.fine_tune.optimizer == job.spec.transfer.optimizer


def test_missing_file_is_reported(tmp_path: Path) -> None:
    assert problems_in_file(tmp_path / "none.yaml") == ["job.yaml: does not exist. Check the path."]


def test_directory_is_reported(tmp_path: Path) -> None:
    assert problems_in_file(tmp_path) == ["job.yaml: is a directory. Pass the YAML files in it instead."]


def test_path_through_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert problems_in_file(tmp_path / "file" / "job.yaml") == ["job.yaml: cannot be read: Not a directory."]


def test_path_with_null_byte_is_reported() -> None:
    with pytest.raises(InvalidSpecError, match="cannot be read: embedded null byte"):
        read_jobs(Path("a\0b"))


def test_empty_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("# only a comment\n---\n")
    assert problems_in_file(tmp_path / "job.yaml") == [
        "job.yaml: contains no job. A spec starts with apiVersion: topwork.dev/v1alpha1."
    ]


def test_binary_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert problems_in_file(tmp_path / "job.yaml") == [
        "job.yaml:1:1: byte 0x89 is not valid UTF-8. If this is a YAML file, save it as UTF-8."
    ]


def test_invalid_byte_is_reported_with_its_position() -> None:
    with pytest.raises(InvalidSpecError) as caught:
        read_bytes("kind: a\nname: é".encode() + b"\xff", "job.yaml")
    assert [(problem.line, problem.column) for problem in caught.value.problems] == [(2, 8)]


def test_utf_16_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(VALID, encoding="utf-16")
    assert problems_in_file(tmp_path / "job.yaml") == ["job.yaml: is encoded in UTF-16. Save it as UTF-8."]


def test_oversized_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    assert problems_in_file(tmp_path / "job.yaml") == [
        "job.yaml: is larger than 1048576 bytes, the maximum size of a spec."
    ]


def test_oversized_text_is_reported() -> None:
    assert problems_in("#" * 262_145) == [
        "job.yaml:1:1: the file has 262145 characters, more than the maximum of 262144."
    ]


@pytest.mark.parametrize(
    ("text", "shown"), [("- a\n- b\n", "a list of 2"), ("job", '"job"'), ("42", "42"), ("true", "true")]
)
def test_document_that_is_not_a_mapping_is_reported(text: str, shown: str) -> None:
    assert problems_in(text) == [f"job.yaml:1:1: {shown} is not a job. A job is a mapping that starts with apiVersion."]


def test_alias_bomb_is_reported() -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{level}: &a{level + 1} [{', '.join([f'*a{level}'] * 9)}]" for level in range(8)]
    (line,) = problems_in("\n".join(lines))
    assert line.endswith("the document has more than 20000 values, counting each use of an alias.")


@pytest.mark.parametrize("depth", [65, 1_000])
def test_deep_nesting_is_reported(depth: int) -> None:
    (line,) = problems_in("a: " + "[" * depth + "]" * depth)
    assert line.endswith("the document has more than 64 levels of nesting.")


def test_merge_key_is_reported_with_its_line() -> None:
    line = "job.yaml:3:3: c.<<: merge keys (<<) are not supported. Write out the keys."
    assert line in problems_in("a: &a {b: 1}\nc:\n  <<: *a\n")


def test_snake_case_keys_are_rejected() -> None:
    assert problems_in(VALID.replace("apiVersion:", "api_version:")) == [
        "job.yaml:2:1: apiVersion: is required. Version of the spec format. Allowed: topwork.dev/v1alpha1.",
        "job.yaml:2:1: api_version: unknown key. Did you mean apiVersion? Known keys: apiVersion, kind, metadata, "
        "spec.",
    ]
