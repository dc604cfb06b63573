"""The report of a search, the table of its trials, its best parameters, and the importance of the parameters."""

import math
import random
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console
from ruamel.yaml import YAML

from topwork.cli.output.search_table import (
    format_best,
    format_overrides_of,
    format_state,
    format_trials,
    ranked,
)
from topwork.cli.output.search_view import SearchView
from topwork.registry.versions import Version
from topwork.report.search_report import SearchResults, render_search_report
from topwork.search.importance import parameter_importance
from topwork.search.parameter_names import short_names
from topwork.search.trials import Trial, TrialResult
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_text
from topwork.spec.loading.overrides import parse_overrides
from topwork.spec.search import TransferSearch
from topwork.spec.search.space import trial_spec

RATE, DROPOUT, HEAD = "transfer.optimizer.learningRate", "model.head.dropout", "model.head.pooling"
HOSTILE = "<script>alert('x')</script> $\\alpha$ & more"


@pytest.fixture
def search():
    return make_search({RATE: {"logUniform": [1e-4, 1e-1]}, DROPOUT: {"uniform": [0.0, 0.5]}})


def make_search(space, **overrides):
    template = {
        "storage": "s3://photos/topwork",
        "dataset": {
            "source": {"folder": {"uri": "photos"}},
            "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
            "imageSize": [32, 32],
        },
        "model": {"base": {"cnn": {"filters": [4]}}},
        "transfer": {"train": "all", "epochs": 9},
        "compute": {"gpus": 0},
    }
    spec = {"template": template, "space": space, "trials": 12, **overrides}
    return TransferSearch.model_validate(
        {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferSearch", "metadata": {"name": "digits"}, "spec": spec}
    )


def make_trial(number, params, value=None, state="complete", epochs=9, **changes):
    results = ()
    if value is not None:
        metrics = {"accuracy": value, "loss": 1 - value}
        results = (TrialResult(epochs, f"digits-{number}-0123abcd", value, metrics, 2.5),)
    trial = Trial(number, params, state, epochs, results, seconds=2.5 if results else 0.0)
    return replace(trial, **changes)


@pytest.fixture
def trials():
    """Trials in every state. The accuracy depends on the learning rate only; trial 2 is the best."""
    generator = random.Random(0)
    values = [{RATE: 10 ** generator.uniform(-4, -1), DROPOUT: generator.uniform(0, 0.5)} for _ in range(12)]
    made = [make_trial(n, params, 0.9 + 0.02 * math.log10(params[RATE])) for n, params in enumerate(values)]
    made[2] = make_trial(2, values[2], 0.95)
    made[8] = make_trial(8, values[8], 0.96, "pruned", epochs=3)
    made[9] = make_trial(9, values[9], None, "failed", error=f"Loss is NaN: training diverged. {HOSTILE}")
    made[10] = make_trial(10, values[2], 0.95, equal_to=2, seconds=0.0)
    made[11] = make_trial(11, values[11], None, "running")
    return tuple(made)


def make_results(search, trials, **changes):
    best = max((trial for trial in trials if trial.state == "complete"), key=lambda trial: trial.value, default=None)
    importance = parameter_importance(search, trials)
    return SearchResults(search, trials, best, "all 12 trials are finished", importance, None, None, **changes)


def published(**metrics):
    return Version(
        name="digits",
        version=3,
        uri="s3://photos/topwork/models/digits/3",
        run="digits-89abcdef",
        weights="0" * 64,
        published="2026-05-01T00:00:00Z",
        main_metric="accuracy",
        metrics=metrics,
        split="test",
        images=361,
    )


class _TextParser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.text, self.tags = "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def parse(html):
    parser = _TextParser()
    parser.feed(html)
    return parser


def test_report_shows_every_trial_and_escapes_texts(search, trials):
    page = parse(render_search_report(make_results(search, trials)))
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert page.tags.count("svg") == 4  # history, importance, parameters, cost
    for text in ("digits-0-0123abcd", "as trial 2", "learningRate", "12 of 12 trials", "all 12 trials are finished"):
        assert text in page.text


def test_report_says_that_the_validation_value_is_optimistic(search, trials):
    results = make_results(search, trials)
    assert results.selection_note == (
        "accuracy 0.9500 on the validation split is the best of 9 complete trials. The same images selected it, so "
        "the value is optimistic: expect a lower one on other images. No model of this search is published, so there "
        "is no value on the test split."
    )
    note = replace(results, version=published(accuracy=0.91)).selection_note
    assert note.endswith(
        "The test split took no part in the search: the published model has accuracy 0.9100 on its 361 images."
    )
    note = replace(results, version=published(accuracy=0.91).model_copy(update={"split": "validation"})).selection_note
    assert note.endswith("It is optimistic, too: these images selected the model.")
    assert "do not include accuracy" in replace(results, version=published(auc=0.91)).selection_note


def test_report_without_a_complete_trial(search):
    failed = (make_trial(0, {RATE: 0.01, DROPOUT: 0.1}, None, "failed", error="exit code 2"),)
    page = parse(render_search_report(make_results(search, failed)))
    assert "No trial is complete" in page.text
    assert "exit code 2" in page.text
    assert "svg" not in page.tags


def test_report_of_a_pruned_search_shows_rungs(search):
    def climb(number, *values):
        results = tuple(
            TrialResult(epochs, "r", value, {"accuracy": value}, 1.0)
            for epochs, value in zip((1, 3, 9), values, strict=False)
        )
        state = "complete" if len(values) == 3 else "pruned"
        return replace(make_trial(number, {RATE: 0.01, DROPOUT: 0.1}, 0.5, state), results=results)

    page = parse(render_search_report(make_results(search, (climb(0, 0.5, 0.6, 0.7), climb(1, 0.4)))))
    assert "ones were stopped" in page.text


def test_plots_of_choices_of_sections_and_conditional_parameters():
    space = {
        HEAD: {"choice": ["avg", "max"]},
        DROPOUT: {"uniform": [0.0, 0.5], "when": {HEAD: "avg"}},
        "augmentation": {"choice": [{"flip": "horizontal"}, {"rotation": 0.1}]},
    }
    search = make_search(space)
    flip, turn = space["augmentation"]["choice"]
    made = (
        make_trial(0, {HEAD: "avg", DROPOUT: 0.25, "augmentation": flip}, 0.9),
        make_trial(1, {HEAD: "max", "augmentation": turn}, 0.8),
    )
    assert "horizontal" in render_search_report(make_results(search, made))


def test_importance_finds_the_parameter_that_matters(search, trials):
    importance = parameter_importance(search, trials)
    assert importance.shares[RATE] > 0.6
    assert sum(importance.shares.values()) == pytest.approx(1.0)
    assert importance.note == (
        "Share in the variation of accuracy, by fANOVA from 8 trials. With fewer than 30 trials, this is only a hint."
    )
    assert parameter_importance(search, trials) == importance


def test_importance_is_not_biased_by_the_selection_of_a_pruner():
    space = {RATE: {"logUniform": [1e-4, 1e-1]}, DROPOUT: {"uniform": [0.0, 0.5]}}
    generator, made = random.Random(0), []
    for number in range(24):
        params = {RATE: 10 ** generator.uniform(-4, -1), DROPOUT: generator.uniform(0, 0.5)}
        first = TrialResult(1, "run", 0.9 + 0.1 * math.log10(params[RATE]), {}, 1.0)
        last = TrialResult(9, "run", 0.9 + 0.1 * params[DROPOUT], {}, 1.0)
        is_good = params[RATE] > 10**-2.5
        trial = make_trial(number, params, 0.5, "complete" if is_good else "pruned")
        made.append(replace(trial, results=(first, last) if is_good else (first,)))
    importance = parameter_importance(make_search(space, pruner="asha"), made)
    assert importance.shares[RATE] > 0.8
    assert "from 24 trials after 1 epoch." in importance.note


def test_importance_of_conditional_parameters():
    space = {HEAD: {"choice": ["avg", "max"]}, DROPOUT: {"uniform": [0.0, 0.5], "when": {HEAD: "avg"}}}
    made = [
        make_trial(n, {HEAD: "avg", DROPOUT: n / 40} if n % 2 else {HEAD: "max"}, 0.9 if n % 2 else 0.5 + n / 100)
        for n in range(20)
    ]
    importance = parameter_importance(make_search(space), made)
    assert "PED-ANOVA from 20 trials" in importance.note
    assert importance.shares[HEAD] > importance.shares[DROPOUT]


def test_importance_is_not_computed_from_few_or_equal_trials(search):
    few = [make_trial(n, {RATE: 0.01, DROPOUT: 0.1}, n / 10) for n in range(7)]
    equal = [make_trial(n, {RATE: 0.01 + n, DROPOUT: 0.1}, 0.5) for n in range(8)]
    assert parameter_importance(search, few) == ({}, "Needs at least 8 comparable trials; there are 7.")
    assert parameter_importance(search, equal) == ({}, "All 8 trials have the same value.")


def test_table_lists_the_best_trial_first(search, trials):
    lines = list(format_trials(ranked(trials, search), search))
    assert lines[0].split() == ["TRIAL", "STATE", "ACCURACY", "EPOCHS", "SECONDS", "learningRate", "dropout"]
    assert lines[1].split()[:5] == ["2", "complete", "0.9500", "9", "2.5"]
    assert lines[2].split()[:4] == ["10", "complete", "0.9500", "9"]
    assert [line.split()[1] for line in lines[1:13]] == ["complete"] * 9 + ["pruned", "failed", "running"]
    assert lines[13].startswith("trial 10 has the parameters of trial 2")
    assert lines[14].startswith("trial 9 failed: Loss is NaN")


def test_lower_values_are_better_for_the_loss(trials):
    search = make_search({RATE: {"logUniform": [1e-4, 1e-1]}}, metric="loss")
    assert ranked(trials, search)[0].value == min(trial.value for trial in trials if trial.state == "complete")
    results = SearchResults(search, trials, trials[1], "", parameter_importance(search, ()), None, None)
    assert "expect a higher one on other images" in results.selection_note


def test_state_on_one_line(search, trials):
    assert format_state(trials, trials[2], search) == (
        "12 of 12 trials: 1 running, 9 complete, 1 pruned, 1 failed; best accuracy 0.9500 (trial 2)"
    )
    assert format_state((), None, search) == "0 of 12 trials"


def test_best_parameters_can_be_pasted_and_used_as_options(search, trials):
    best = trials[2]
    text = format_best(best, search, "digits-0123abcd")
    assert text.startswith("# digits-0123abcd, trial 2: accuracy 0.95 on the validation split\nspec:\n")
    spec = YAML(typ="safe").load(text)["spec"]
    assert spec == {
        "transfer": {"optimizer": {"learningRate": best.params[RATE]}},
        "model": {"head": {"dropout": best.params[DROPOUT]}},
    }
    job = TransferJob(
        api_version="topwork.dev/v1alpha1", kind="TransferJob", metadata=search.metadata, spec=search.spec.template
    )
    options = [shlex.split(item)[-1] for item in format_overrides_of(best.params)]
    text = job.model_dump_json(by_alias=True, exclude_unset=True)
    [overridden] = read_text(text, "job.json", parse_overrides(options))
    assert overridden.spec == trial_spec(search, best.params)


@pytest.mark.parametrize("path", ["model.base.cnn.filters.0", "model.base.cnn.filters[0]"])
def test_best_items_of_a_list_are_printed_with_the_whole_list(path):
    search = make_search({path: {"int": [4, 16]}})
    best = make_trial(0, {path: 9}, 0.5)
    assert YAML(typ="safe").load(format_best(best, search, "x"))["spec"] == {
        "model": {"base": {"cnn": {"filters": [9]}}}
    }


def test_short_names_stay_different():
    paths = ["transfer.optimizer.learningRate", "fineTune.optimizer.learningRate", "model.head.dropout", "dropout"]
    assert list(short_names(paths).values()) == [
        "transfer.optimizer.learningRate",
        "fineTune.optimizer.learningRate",
        "head.dropout",
        "dropout",
    ]


def test_live_view_shows_running_and_best_trials(search, trials):
    class FakeStudy:
        best = trials[2]

    FakeStudy.trials = trials
    console = Console(file=StringIO(), width=120, force_terminal=True, color_system=None)
    view = SearchView(search, console)
    view.observe(FakeStudy)
    with view.track("transfer", 9) as tracker:
        tracker.advance(4, loss=0.25)
        console.print(view._render())
    text = console.file.getvalue()
    assert "best accuracy 0.9500 (trial 2)" in text
    assert "transfer 4/9 loss 0.25" in text
    rows = [line.split()[:2] for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert rows[:2] == [["11", "running"], ["2", "complete"]]
