"""Property-based tests: any input results in jobs or problems, never in another exception."""

from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_bytes, read_text
from topwork.spec.loading.problems import InvalidSpecError

VALID = Path(__file__).with_name("valid_spec.yaml").read_text(encoding="utf-8")
LINES = VALID.splitlines()
fuzz_settings = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

# YAML syntax elements, so that random texts exercise the parser.
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


def read_or_catch(text: str) -> list[TransferJob] | InvalidSpecError:
    try:
        return read_text(text, "job.yaml")
    except InvalidSpecError as error:
        assert error.problems
        assert all(problem.message and "\n" not in str(problem) for problem in error.problems)
        return error


@fuzz_settings
@given(st.text(max_size=200))
@example("")
@example("\\\x00")
def test_any_text_results_in_jobs_or_problems(text: str) -> None:
    read_or_catch(text)


@fuzz_settings
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
@example('"\\U11111111"')
@example("%YAML 9.9\n---\na")
@example("!!int {}")
@example("!!map a")
@example("!!float ''")
@example("? {a: b}\n: c")
@example("&a [*a, *a]")
@example("!!timestamp x")
def test_any_yaml_results_in_jobs_or_problems(text: str) -> None:
    read_or_catch(text)


@fuzz_settings
@given(st.binary(max_size=200))
def test_any_bytes_result_in_jobs_or_problems(data: bytes) -> None:
    try:
        read_bytes(data, "job.yaml")
    except InvalidSpecError as error:
        assert error.problems


@fuzz_settings
@given(st.integers(0, len(VALID) - 1), st.integers(0, 8), st.sampled_from(PIECES))
def test_valid_spec_with_a_typo_results_in_jobs_or_problems(start: int, length: int, piece: str) -> None:
    read_or_catch(VALID[:start] + piece + VALID[start + length :])


@fuzz_settings
@given(st.lists(st.integers(0, len(LINES) - 1), max_size=4), st.integers(-2, 2))
def test_valid_spec_with_removed_or_indented_lines_results_in_jobs_or_problems(removed: list[int], shift: int) -> None:
    lines = [line for index, line in enumerate(LINES) if index not in removed]
    if removed:
        index = removed[0] % len(lines)
        lines[index] = " " * max(shift, 0) + lines[index][max(-shift, 0) :]
    read_or_catch("\n".join(lines))


@fuzz_settings
@given(st.integers(1, len(LINES) - 1), VALUES)
def test_valid_spec_with_any_value_results_in_jobs_or_problems(index: int, value: object) -> None:
    key = LINES[index].partition(":")[0]
    read_or_catch("\n".join([*LINES[:index], f"{key}: {value!r}", *LINES[index + 1 :]]))
