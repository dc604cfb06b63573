"""Whatever is handed in: a job or a problem, and never a traceback."""

from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_bytes, read_text
from topwork.spec.loading.problems import InvalidSpecError

GOOD = Path(__file__).with_name("test_spec_good.yaml").read_text(encoding="utf-8")
LINES = GOOD.splitlines()
quickly = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

# Pieces of YAML that mean something to a parser, so that random texts are more than words.
PIECES = [
    "a", "- ", ": ", "\n", "\n  ", "[", "]", "{", "}", ",", "&a ", "*a", "!!str ", "!x ", "!<", "|", ">-", "'", '"',
    "#", "%YAML 1.1\n", "%TAG ! x\n", "---\n", "...\n", "? ", "\t", "<<: ", "\\", "\\U11111111", "~", "1", "0o9",
    ".inf",
    "0x", "-", "1_", "\0", "\ufeff", "\u2028", "\x85", "\ud800", "=", "@", "`", "2001-01-01", "!!binary x", "!!set {",
]  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["train[:", "s3://", "http://[", "all", "imagenet", "1e-5", "s3://a:b@c/?sig=1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def outcome(text: str) -> list[TransferJob] | InvalidSpecError:
    try:
        return read_text(text, "job.yaml")
    except InvalidSpecError as error:
        assert error.problems
        assert all(problem.message and "\n" not in str(problem) for problem in error.problems)
        return error


@quickly
@given(st.text(max_size=200))
@example("")
@example("\\\x00")
def test_any_text_is_a_job_or_a_problem(text: str) -> None:
    outcome(text)


@quickly
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
@example('"\\U11111111"')
@example("%YAML 9.9\n---\na")
@example("!!int {}")
@example("!!map a")
@example("!!float ''")
@example("? {a: b}\n: c")
@example("&a [*a, *a]")
@example("!!timestamp x")
def test_any_yaml_is_a_job_or_a_problem(text: str) -> None:
    outcome(text)


@quickly
@given(st.binary(max_size=200))
def test_any_bytes_are_a_job_or_a_problem(data: bytes) -> None:
    try:
        read_bytes(data, "job.yaml")
    except InvalidSpecError as error:
        assert error.problems


@quickly
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 8), st.sampled_from(PIECES))
def test_good_spec_with_a_slip_is_a_job_or_a_problem(start: int, length: int, piece: str) -> None:
    outcome(GOOD[:start] + piece + GOOD[start + length :])


@quickly
@given(st.lists(st.integers(0, len(LINES) - 1), max_size=4), st.integers(-2, 2))
def test_good_spec_with_lines_taken_out_or_moved_is_a_job_or_a_problem(out: list[int], shift: int) -> None:
    lines = [line for index, line in enumerate(LINES) if index not in out]
    if out:
        index = out[0] % len(lines)
        lines[index] = " " * max(shift, 0) + lines[index][max(-shift, 0) :]
    outcome("\n".join(lines))


@quickly
@given(st.integers(1, len(LINES) - 1), VALUES)
def test_good_spec_with_any_value_is_a_job_or_a_problem(index: int, value: object) -> None:
    key = LINES[index].partition(":")[0]
    outcome("\n".join([*LINES[:index], f"{key}: {value!r}", *LINES[index + 1 :]]))
