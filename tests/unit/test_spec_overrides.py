"""`--set PATH=VALUE`: parsing, applying and validating overrides, and attributing problems to them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from topwork.cli.options import format_overrides
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_files, read_text
from topwork.spec.loading.overrides import apply_overrides, parse_overrides
from topwork.spec.loading.problems import InvalidSpecError

FILE = Path(__file__).with_name("valid_spec.yaml")
VALID = FILE.read_text(encoding="utf-8")


def job_with(*overrides: str, text: str = VALID) -> TransferJob:
    (job,) = read_text(text, "job.yaml", parse_overrides(overrides))
    return job


def problems_with(*overrides: str, text: str = VALID) -> list[str]:
    with pytest.raises(InvalidSpecError) as caught:
        job_with(*overrides, text=text)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def without(*parts: str) -> str:
    text = VALID
    for part in parts:
        assert part in text
        text = text.replace(part, "")
    return text


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("spec.transfer.epochs=2", "transfer.epochs", 2),
        ("spec.transfer.optimizer.learningRate=1e-2", "transfer.optimizer.learning_rate", 0.01),
        ("spec.dataset.imageSize=[96, 80]", "dataset.image_size", (96, 80)),
        ("spec.dataset.imageSize.1=80", "dataset.image_size", (150, 80)),
        ("spec.dataset.splits.train=train[:10%]", "dataset.splits.train", "train[:10%]"),
        ("spec.model.base.application=ResNet50", "model.base.application", "ResNet50"),
        ("spec.model.base.weights='none'", "model.base.weights", "none"),
        ("spec.transfer.earlyStopping=null", "transfer.early_stopping", None),
        ("spec.transfer.earlyStopping.patience=1", "transfer.early_stopping.patience", 1),
    ],
)
def test_override_replaces_the_value_of_the_file(override: str, path: str, value: object) -> None:
    actual: Any = job_with(override).spec
    for name in path.split("."):
        actual = getattr(actual, name)
    assert actual == value


def test_override_replaces_a_whole_mapping() -> None:
    source = job_with("spec.dataset.source={folder: {uri: /x}}").spec.dataset.source
    assert source.tfds is None
    assert source.folder
    assert source.folder.uri == "/x"


def test_override_accepts_both_notations_of_list_indices() -> None:
    for path in ("spec.evaluate.gates.1.atLeastLatestMinus", "spec.evaluate.gates[1].atLeastLatestMinus"):
        gates = job_with(f"{path}=0.25").spec.evaluate.gates
        assert [gate.at_least_latest_minus for gate in gates] == [None, 0.25]


def test_override_creates_missing_mappings() -> None:
    text = without("  fineTune:\n", "    epochs: 10\n", "    unfreeze: all\n").replace(
        "    optimizer: {name: adam, learningRate: 1.0e-5}\n", ""
    )
    assert job_with(text=text).spec.fine_tune is None
    created = job_with("spec.fineTune.epochs=2", text=text).spec.fine_tune
    assert created
    assert created.epochs == 2
    created = job_with("spec.fineTune.epochs=2", text=f"{text}\n  fineTune: null\n").spec.fine_tune
    assert created


def test_null_removes_a_key_even_if_it_is_not_set() -> None:
    assert job_with("spec.fineTune=null").spec.fine_tune is None
    assert job_with("spec.fineTune=null", "spec.fineTune.epochs=null").spec.fine_tune is None


def test_last_override_of_a_path_wins() -> None:
    assert job_with("spec.seed=1", "spec.seed=2").spec.seed == 2
    spec = job_with("spec.transfer.epochs=3", "spec.transfer={epochs: 4}", "spec.transfer.batchSize=8").spec
    assert (spec.transfer.epochs, spec.transfer.batch_size) == (4, 8)


def test_dot_within_a_key_is_escaped_with_a_backslash() -> None:
    labels = job_with(r"metadata.labels.example\.org/team=a", "metadata.labels.0=b").metadata.labels
    assert labels == {"team": "vision", "example.org/team": "a", "0": "b"}


def test_run_name_depends_on_overrides() -> None:
    plain, other = job_with(), job_with("spec.transfer.epochs=2")
    assert plain.run != other.run
    assert other.run == job_with(text=VALID.replace("epochs: 20", "epochs: 2")).run
    assert plain.run == job_with("spec.transfer.epochs=20", "spec.compute.cpu=4").run


def test_overrides_apply_to_all_documents_of_all_files(tmp_path: Path) -> None:
    two = tmp_path / "two.yaml"
    two.write_text(f"{VALID}---\n{VALID.replace('name: cats-vs-dogs', 'name: other')}")
    jobs = read_files([FILE, two], ["spec.seed=7"])
    assert [job.spec.seed for _, job in jobs] == [7, 7, 7]


def test_apply_overrides_does_not_modify_its_arguments() -> None:
    data = {"spec": {"transfer": {"epochs": 1}}}
    overrides = parse_overrides(["spec.transfer.optimizer={name: sgd}", "spec.transfer.optimizer.momentum=0.9"])
    applied = apply_overrides(data, overrides, "job.yaml")
    assert applied.data == {"spec": {"transfer": {"epochs": 1, "optimizer": {"name": "sgd", "momentum": 0.9}}}}
    assert data == {"spec": {"transfer": {"epochs": 1}}}
    assert overrides[0].value == {"name": "sgd"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "spec.transfer.epochs=0",
            "spec.transfer.epochs: 0 is not allowed. Allowed: an integer from 1 to 10000.",
        ),
        (
            'spec.transfer.epochs="2"',
            'spec.transfer.epochs: "2" is not allowed. Remove the quotes. Allowed: an integer from 1 to 10000.',
        ),
        (
            "spec.evaluate.gates.0.metric=acuracy",
            'spec.evaluate.gates[0].metric: "acuracy" is not allowed. Did you mean accuracy? Allowed: accuracy, top5, '
            "precision, recall, f1, auc, calibrationError.",
        ),
        (
            "spec.tranfser.epochs=2",
            "spec.tranfser: unknown key. Did you mean transfer? Known keys: storage, dataset, model, augmentation, "
            "transfer, fineTune, evaluate, publish, compute, metrics, tracking, seed, suspend.",
        ),
        ("sepc.seed=1", "sepc: unknown key. Did you mean spec? Known keys: apiVersion, kind, metadata, spec."),
        ("spec.tranfser=null", "spec.tranfser: unknown key. Did you mean transfer? Known keys: storage, dataset, "
         "model, augmentation, transfer, fineTune, evaluate, publish, compute, metrics, tracking, seed, suspend."),
        (
            "spec.model=null",
            "spec.model: is required. Base and head of the classifier. Allowed: a mapping with base, head.",
        ),
        ("nothing", "has no =. Use PATH=VALUE, such as spec.transfer.epochs=2."),
        ("=1", "has no path. Use PATH=VALUE, such as spec.transfer.epochs=2."),
        ("spec..seed=1", "has an empty key in its path. Use PATH=VALUE, such as spec.transfer.epochs=2."),
        (
            "spec.seed=",
            "spec.seed: has no value after the =. Use null to remove the key, or '' for an empty string.",
        ),
        (
            "spec.seed=[",
            "spec.seed: is not valid YAML: while parsing a flow node; expected the node content, but found "
            "'<stream end>'.",
        ),
        ("spec.seed.x=1", "spec.seed.x: spec.seed is not a mapping. Allowed: an integer from 0 to 2147483647."),
        (
            "spec.transfer.loss.name=focal",
            'spec.transfer.loss: is "auto" in job.yaml, which has no key "name". Set the whole mapping, such as '
            "spec.transfer.loss={name: …}.",
        ),
        (
            "spec.evaluate.gates.2.metric=f1",
            "spec.evaluate.gates[2]: does not exist in job.yaml: the last index is 1.",
        ),
        (
            "spec.evaluate.gates.first.metric=f1",
            "spec.evaluate.gates.first: spec.evaluate.gates is a list. Use the index of an item, such as "
            "spec.evaluate.gates[0].",
        ),
        (
            "spec.publish.replace.0=a",
            "spec.publish.replace: unknown key. Known keys: enabled, name, formats, fold.",
        ),
        (
            "spec.evaluate.gates.0=null",
            "spec.evaluate.gates[0]: null removes a key, but this is a list item. Set the whole list instead.",
        ),
    ],
)  # fmt: skip
def test_problem_is_attributed_to_the_override(override: str, message: str) -> None:
    assert problems_with(override) == [f"--set {override}: {message}"]


def test_override_of_an_item_requires_the_list() -> None:
    text = without("    metrics: [accuracy, top5, f1, auc]\n")
    assert problems_with("spec.evaluate.metrics.0=f1", text=text) == [
        "--set spec.evaluate.metrics.0=f1: spec.evaluate.metrics: is not set in job.yaml. Set the whole list, such as "
        "spec.evaluate.metrics=[…]."
    ]


def test_override_rejects_several_documents_on_one_line() -> None:
    (line,) = problems_with("spec.seed=1\n---\n2")
    assert line.endswith("spec.seed: has 2 YAML documents after the =. Use a single value.")
    assert "\n" not in line


def test_missing_key_in_a_created_mapping_is_attributed_to_the_override() -> None:
    assert problems_with("spec.fineTune={batchSize: 2}") == [
        "--set spec.fineTune={batchSize: 2}: spec.fineTune.epochs: is required. Set the maximum number of epochs of "
        "this stage."
    ]


def test_problems_of_the_file_keep_their_position() -> None:
    assert problems_with("spec.transfer.epochs=0", text=VALID.replace("seed: 42", "seed: a")) == [
        "--set spec.transfer.epochs=0: spec.transfer.epochs: 0 is not allowed. Allowed: an integer from 1 to 10000.",
        'job.yaml:51:9: spec.seed: "a" is not allowed. Allowed: an integer from 0 to 2147483647.',
    ]


def test_override_fixes_an_invalid_value_in_the_file() -> None:
    assert job_with("spec.seed=1", text=VALID.replace("seed: 42", "seed: a")).spec.seed == 1


def test_same_problem_in_several_documents_is_reported_once() -> None:
    with pytest.raises(InvalidSpecError) as caught:
        read_files([FILE, FILE], ["spec.seed=a"])
    assert len(caught.value.problems) == 1


def test_all_invalid_overrides_are_reported_at_once() -> None:
    assert len(problems_with("nothing", "=", "sepc=1")) == 3


def test_replaced_override_is_not_blamed() -> None:
    assert [line.split(": ")[0] for line in problems_with("spec.transfer.epochs=3", "spec.transfer={epochs: 0}")] == [
        "--set spec.transfer={epochs"
    ]


def test_options_in_a_printed_command_are_quoted_for_the_shell() -> None:
    assert format_overrides(["spec.seed=1", "spec.transfer={epochs: 1}"]) == [
        "--set spec.seed=1",
        "--set 'spec.transfer={epochs: 1}'",
    ]


def test_password_in_an_override_is_redacted() -> None:
    lines = problems_with("spec.dataset.source={archive: {uri: 'https://user:secret@host/x.zip'}}")
    assert all("secret" not in line for line in lines)
    assert lines[0].startswith("--set spec.dataset.source={archive: {uri: 'https…host/x.zip'}}: ")


STEPS = (
    "spec transfer fineTune unfreeze steps epochs evaluate gates dataset imageSize metadata labels loss name "
    "0 1 99999999999 -1 [0] <all> <name> \\ ²"
)
PATHS = st.lists(st.sampled_from([*STEPS.split(), ""]), max_size=5).map(".".join)
YAML = st.text(max_size=12) | st.sampled_from(["null", "all", "[", "{a: 1}", "1e999", ".nan", "&a [*a]", "<<: 1", "\0"])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.text(max_size=30) | st.builds("{}={}".format, PATHS, YAML), max_size=3))
@example(["spec.transfer.loss.<name>=focal"])
@example(["spec=null", "spec.seed=1"])
@example(["spec=1", "spec.seed=1"])
@example(["spec.²=1"])
@example(["\ud800=1"])
def test_any_overrides_result_in_a_job_or_problems(overrides: list[str]) -> None:
    try:
        job_with(*overrides)
    except InvalidSpecError as error:
        assert error.problems
        assert all(problem.message and "\n" not in str(problem) for problem in error.problems)


def topwork(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "topwork", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_validate_accepts_overrides() -> None:
    digest = job_with("spec.seed=1", "spec.transfer.epochs=2").digest[:8]
    completed = topwork("validate", str(FILE), "--set", "spec.seed=1", "--set", "spec.transfer.epochs=2")
    assert (completed.returncode, completed.stdout) == (
        0,
        f"{FILE}: TransferJob cats-vs-dogs ok (digest {digest})\n",
    ), completed.stderr


@pytest.mark.parametrize("command", ["validate", "render", "submit", "run"])
def test_invalid_override_exits_with_code_2(command: str) -> None:
    completed = topwork(command, str(FILE), "--set", "spec.transfer.epochs=0")
    assert (completed.returncode, completed.stdout) == (2, "")
    assert completed.stderr == (
        "--set spec.transfer.epochs=0: spec.transfer.epochs: 0 is not allowed. Allowed: an integer from 1 to 10000.\n"
    )


@pytest.mark.parametrize("command", [["render"], ["submit", "--dry-run", "client"]])
def test_rendered_job_contains_the_overrides(command: list[str]) -> None:
    completed = topwork(*command, str(FILE), "--set", "spec.compute.gpus=1", "--set", "spec.seed=7")
    assert completed.returncode == 0, completed.stderr
    assert "nvidia.com/gpu: 1" in completed.stdout
    assert "seed: 7" in completed.stdout
    assert job_with("spec.seed=7").run in completed.stdout
