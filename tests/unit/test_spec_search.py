"""The spec of a search: its mistakes with their positions, the specs of trials, and reading both kinds of specs."""
# ruff: noqa: E501 - each row is a change to the valid search and all problems that it causes

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from topwork.cli.commands.spec import validate
from topwork.spec import TransferJob
from topwork.spec.applications import MIN_SIDE
from topwork.spec.loading.defaults import SpecDefaults, flatten_defaults
from topwork.spec.loading.loader import read_data, read_files, read_search_data, read_searches, read_specs
from topwork.spec.loading.problems import InvalidSpecError
from topwork.spec.loading.yaml_document import read_documents
from topwork.spec.search import TransferSearch
from topwork.spec.search.space import (
    combinations,
    count_combinations,
    draw_parameters,
    is_active,
    is_same,
    last_stage,
    ordered_parameters,
    trial_spec,
)
from topwork.spec.search.value_checks import search_warnings

FILE = Path(__file__).with_name("valid_search.yaml")
VALID = FILE.read_text(encoding="utf-8")
JOB = Path(__file__).with_name("valid_spec.yaml")
APPLICATIONS = ", ".join(MIN_SIDE)
LEARNING_RATE, DROPOUT = "{logUniform: [1.0e-4, 1.0e-1]}", "{uniform: [0.0, 0.5]}"
BATCH_SIZE, WHEN = "transfer.batchSize: {int: [16, 64]}", "when: {transfer.optimizer.name: sgd}"
MOMENTUM = f"    transfer.optimizer.momentum:\n      uniform: [0.5, 0.99]\n      {WHEN}\n"
SPLITS = "{train: 0.8, validation: 0.1, test: 0.1}"
FINE_TUNE = "      metrics: [accuracy, f1]\n    fineTune: {epochs: 4, optimizer: {learningRate: 0.0001}}"
OPTIMIZER_KEYS = "name, learningRate, schedule, momentum, nesterov, beta1, beta2, rho, epsilon, weightDecay, clipnorm, globalClipnorm, clipvalue, gradientAccumulationSteps, ema"
KINDS = "exactly one of uniform, logUniform, int and choice is required."
PRUNER = "asha continues trials with more epochs, but"
OTHER_PRUNER = "or set pruner: none."
NO_EPOCHS = (
    "cannot be a parameter, because the pruner decides the epochs of the last stage. Remove it, or set pruner: none."
)

# fmt: off
MISTAKES: list[tuple[dict[str, str], list[str]]] = [
    # Keys and types
    ({"  trials: 16": "  trails: 16"}, ["29:3: spec.trails: unknown key. Did you mean trials? Known keys: template, space, metric, trials, parallel, budget, sampler, pruner, seed, suspend.", ]),
    ({"  trials: 16": "  trials: 1001"}, ["29:11: spec.trials: 1001 is not allowed. Allowed: an integer from 1 to 1000.", ]),
    ({"  trials: 16": "  budget: {gpuHours: 0}"}, ["29:22: spec.budget.gpuHours: 0 is not allowed. Allowed: a number above 0 and at most 1000000.", ]),
    ({"sampler: tpe": "sampler: tep"}, ['30:12: spec.sampler: "tep" is not allowed. Did you mean tpe? Allowed: tpe, random, grid, cmaes.', ]),
    ({"metric: accuracy": "metric: acuracy"}, ['28:11: spec.metric: "acuracy" is not allowed. Did you mean accuracy? Allowed: accuracy, top5, precision, recall, f1, auc, calibrationError, loss.', ]),
    ({"kind: TransferSearch": "kind: TransferSerch"}, ['3:7: kind: "TransferSerch" is not allowed. Did you mean TransferSearch? Allowed: TransferSearch.', ]),
    ({"kind: TransferSearch": "kind: [TransferSearch]"}, ["3:7: kind: a list of 1 is not allowed. Allowed: TransferSearch.", ]),
    # Parameters
    ({LEARNING_RATE: "{logUniformm: [1, 2]}"}, ["21:39: spec.space.transfer.optimizer.learningRate.logUniformm: unknown key. Did you mean logUniform? Known keys: uniform, logUniform, int, choice, when.", ]),
    ({LEARNING_RATE: "{}"}, [f"21:38: spec.space.transfer.optimizer.learningRate: none is set, but {KINDS}", ]),
    ({LEARNING_RATE: "{logUniform: [1, 2], int: [1, 2]}"}, [f"21:38: spec.space.transfer.optimizer.learningRate: logUniform and int are set, but {KINDS}", ]),
    ({LEARNING_RATE: "{logUniform: [0, 0.1]}"}, ["21:52: spec.space.transfer.optimizer.learningRate.logUniform[0]: 0 is not allowed. Allowed: a number above 0 and at most 1000000000000.", ]),
    ({LEARNING_RATE: "{logUniform: [0.1, 0.00001]}"}, ["21:51: spec.space.transfer.optimizer.learningRate.logUniform: [0.1, 1e-05] is not a range. Expected [smallest, largest] with the smallest value below the largest.", ]),
    ({DROPOUT: "{uniform: [0.5, 0.1]}"}, ["22:35: spec.space.model.head.dropout.uniform: [0.5, 0.1] is not a range. Expected [smallest, largest] with the smallest value below the largest.", ]),
    ({LEARNING_RATE: "{logUniform: [0.1]}"}, ["21:51: spec.space.transfer.optimizer.learningRate.logUniform: a list of 1 is not allowed. Allowed: a list of 2, each a number above 0 and at most 1000000000000.", ]),
    ({"[16, 64]": "[16, 16]"}, ["23:31: spec.space.transfer.batchSize.int: [16, 16] is not a range. Expected [smallest, largest] with the smallest value below the largest.", ]),
    ({"[adam, sgd]": "[adam, sgd, adam]"}, ['24:51: spec.space.transfer.optimizer.name.choice[2]: "adam" is listed twice. Remove one of them.', ]),
    # Paths
    ({"transfer.optimizer.learningRate:": "transfer.optimizer.learnigRate:"}, [f"21:37: spec.space.transfer.optimizer.learnigRate: unknown key. Did you mean learningRate? Known keys: {OPTIMIZER_KEYS}.", ]),
    ({"transfer.batchSize:": "batchSize:"}, ["23:16: spec.space.batchSize: unknown key. It is a key of transfer or fineTune. Known keys: storage, dataset, model, augmentation, transfer, fineTune, evaluate, publish, compute, metrics, tracking, seed, suspend.", ]),
    ({"transfer.batchSize:": "spec.template.transfer.batchSize:"}, ["23:39: spec.space.spec.template.transfer.batchSize: unknown key. Known keys: storage, dataset, model, augmentation, transfer, fineTune, evaluate, publish, compute, metrics, tracking, seed, suspend. Paths start below spec.template: write transfer.batchSize.", ]),
    ({"transfer.batchSize:": "transfer.epochs.x:"}, ["23:24: spec.space.transfer.epochs.x: transfer.epochs is not a mapping. Allowed: an integer from 1 to 10000.", ]),
    ({"transfer.batchSize:": "transfer..batchSize:"}, ["23:26: spec.space.transfer..batchSize: has an empty key in its path.", ]),
    ({"transfer.batchSize:": "Transfer.batchSize:"}, ['23:5: spec.space.Transfer.batchSize: "Transfer.batchSize" is not allowed as a key. Allowed: the path of a key of the template, such as transfer.optimizer.learningRate.', ]),
    ({BATCH_SIZE: "transfer.optimizer: {choice: [{name: adam}]}", "    transfer.optimizer.name: {choice: [adam, sgd]}\n": "", f"      {WHEN}\n": ""}, ["21:38: spec.space.transfer.optimizer.learningRate: is part of the parameter transfer.optimizer. Remove one of them.", "24:5: spec.space.transfer.optimizer.momentum: is part of the parameter transfer.optimizer. Remove one of them.", ]),
    ({BATCH_SIZE: "storage: {choice: [s3://one, s3://two]}"}, ["23:14: spec.space.storage: cannot be a parameter: all trials share the datasets and stages of one storage.", ]),
    ({BATCH_SIZE: "dataset.splits.train: {uniform: [0.1, 0.2]}"}, ["23:27: spec.space.dataset.splits.train: cannot be a parameter: trials are compared on the same images. Of dataset, only imageSize, imageFit and valueRange can be parameters.", ]),
    ({BATCH_SIZE: "dataset: {choice: [{}]}"}, ["23:14: spec.space.dataset: cannot be a parameter: trials are compared on the same images. Of dataset, only imageSize, imageFit and valueRange can be parameters.", ]),
    ({BATCH_SIZE: "compute.gpus: {int: [1, 2]}"}, ["23:19: spec.space.compute.gpus: cannot be a parameter: does not affect the result of training. Of compute, only precision can be a parameter.", ]),
    ({BATCH_SIZE: "seed: {int: [1, 2]}"}, ["23:11: spec.space.seed: cannot be a parameter: trials with different seeds differ by chance.", ]),
    # Conditions
    ({WHEN: "when: {transfer.optimizer.nam: sgd}"}, ["27:38: spec.space.transfer.optimizer.momentum.when.transfer.optimizer.nam: is not a parameter. Did you mean transfer.optimizer.name? Parameters: transfer.optimizer.learningRate, model.head.dropout, transfer.batchSize, transfer.optimizer.name, transfer.optimizer.momentum.", ]),
    ({WHEN: "when: {transfer.optimizer.name: lion}"}, ['27:39: spec.space.transfer.optimizer.momentum.when.transfer.optimizer.name: "lion" is not a value of transfer.optimizer.name, so this is never met.', ]),
    ({WHEN: "when: {model.head.dropout: 0.1}"}, ["27:34: spec.space.transfer.optimizer.momentum.when.model.head.dropout: model.head.dropout is continuous. A condition requires a parameter with int or choice.", ]),
    ({WHEN: "when: {transfer.batchSize: 65}"}, ["27:34: spec.space.transfer.optimizer.momentum.when.transfer.batchSize: 65 is not a value of transfer.batchSize, so this is never met.", ]),
    ({"[adam, sgd]}": "[adam, sgd], when: {transfer.batchSize: 16}}", "{int: [16, 64]}": "{int: [16, 64], when: {transfer.optimizer.name: sgd}}"}, ["23:73: spec.space.transfer.batchSize.when.transfer.optimizer.name: transfer.optimizer.name depends on transfer.batchSize itself. Remove one of the conditions.", "24:79: spec.space.transfer.optimizer.name.when.transfer.batchSize: transfer.batchSize depends on transfer.optimizer.name itself. Remove one of the conditions.", ]),
    ({"[adam, sgd]}": "[adam, sgd], when: {transfer.batchSize: 16}}", WHEN: "when: {transfer.optimizer.name: sgd, transfer.batchSize: 17}"}, ["27:13: spec.space.transfer.optimizer.momentum.when: is never met: its conditions contradict each other. Remove one.", ]),
    # Values
    ({LEARNING_RATE: "{logUniform: [0.0001, 100]}"}, ["21:60: spec.space.transfer.optimizer.learningRate.logUniform[1]: 100.0 is not allowed. Allowed: a number above 0 and at most 10.", ]),
    ({DROPOUT: "{uniform: [-0.1, 1.0]}"}, ["22:36: spec.space.model.head.dropout.uniform[0]: -0.1 is not allowed. Allowed: a number from 0 to below 1.", "22:42: spec.space.model.head.dropout.uniform[1]: 1.0 is not allowed. Allowed: a number from 0 to below 1.", ]),
    ({"{int: [16, 64]}": "{uniform: [16, 64]}"}, ["23:36: spec.space.transfer.batchSize.uniform[0]: 16.0 is not allowed. Allowed: an integer from 1 to 65536. Use int.", "23:40: spec.space.transfer.batchSize.uniform[1]: 64.0 is not allowed. Allowed: an integer from 1 to 65536. Use int.", ]),
    ({"[adam, sgd]": "[adm, sgd]"}, ['24:40: spec.space.transfer.optimizer.name.choice[0]: "adm" is not allowed. Did you mean adam? Allowed: adadelta, adafactor, adagrad, adam, adamax, adamw, ftrl, lion, nadam, rmsprop, sgd.', ]),
    ({BATCH_SIZE: "transfer.loss: {choice: [auto, {name: focal, gama: 3}]}"}, ["23:56: spec.space.transfer.loss.choice[1].gama: unknown key. Did you mean gamma? Known keys: name, labelSmoothing, gamma.", ]),
    ({BATCH_SIZE: "dataset.imageSize: {choice: [[96, 96], [96, 8]]}"}, ["23:49: spec.space.dataset.imageSize.choice[1][1]: 8 is not allowed. Allowed: an integer from 16 to 2048.", ]),
    ({"[96, 96]": "[70, 96]", BATCH_SIZE: "model.base.application: {choice: [MobileNetV2, Xception]}"}, ['23:52: spec.space.model.base.application.choice[1]: "Xception" is refused. spec.template.dataset.imageSize[0]: 70 is too small for Xception, which needs at least 71 pixels.', ]),
    ({BATCH_SIZE: "dataset.imageSize[0]: {choice: [null]}"}, ["23:37: spec.space.dataset.imageSize[0].choice[0]: null removes a key, but this is a list item. Set the whole list instead.", ]),
    ({BATCH_SIZE: "fineTune.batchSize: {choice: [8]}"}, ["23:35: spec.space.fineTune.batchSize.choice[0]: 8 is refused. spec.template.fineTune.epochs: is required. Set the maximum number of epochs of this stage.", ]),
    ({"      metrics: [accuracy, f1]": FINE_TUNE, MOMENTUM: "", "    transfer.optimizer.name: {choice: [adam, sgd]}\n": "", BATCH_SIZE: "fineTune.optimizer.learningRate: {logUniform: [0.0001, 1]}"}, ["24:60: spec.space.fineTune.optimizer.learningRate.logUniform[1]: 1.0 is above spec.template.transfer.optimizer.learningRate 0.001. A higher learning rate destroys pretrained weights. Try a tenth of it, 0.0001.", ]),
    ({"      epochs: 9": "      epochs: 9\n      featureCache: off", BATCH_SIZE: "transfer.featureCache.views: {choice: [2]}"}, ['24:44: spec.space.transfer.featureCache.views.choice[0]: 2 is refused. spec.template.transfer.featureCache: is "off" in the template, which has no key "views". Set the whole mapping, such as transfer.featureCache={views: …}.', ]),
    ({BATCH_SIZE: "augmentation.mixUp: {choice: [1.0]}\n    augmentation.cutMix: {choice: [0.5]}"}, ["20:3: spec.space: all of 200 random combinations are refused. The first reason: cannot be combined with mixUp: both mix the same images and labels. Set one of them to 0.", ]),
    # Metric and splits
    ({"metric: accuracy": "metric: auc"}, ["28:11: spec.metric: auc is not in spec.template.evaluate.metrics: accuracy, f1. Add it there, or use loss.", ]),
    ({"metric: accuracy": "metric: loss", BATCH_SIZE: "transfer.loss.labelSmoothing: {uniform: [0.0, 0.1]}"}, ["28:11: spec.metric: loss is not comparable between trials, because transfer.loss.labelSmoothing changes the loss function. Use accuracy or another metric.", ]),
    ({SPLITS: "{train: 0.8, test: 0.1}"}, ["11:15: spec.template.dataset.splits: has no validation split, on which trials are compared. Add validation.", ]),
    ({SPLITS: "{train: 0.8, validation: 0.1}"}, ["11:15: spec.template.dataset.splits: has no test split. The best trial is selected on the validation split, so only other images can tell how good it is. Add test.", ]),
    ({SPLITS: "{folds: 5, validation: 0.1}"}, ["11:23: spec.template.dataset.splits.folds: cross-validation is not supported in a search: trials are compared on one validation split. Use fractions, such as {train: 0.8, validation: 0.1, test: 0.1}.", ]),
    # Template
    ({SPLITS: "{train: 0.8, validation: 0.1, tst: 0.1}", "epochs: 9": "epochs: nine"}, ["11:15: spec.template.dataset.splits: has no test split. The best trial is selected on the validation split, so only other images can tell how good it is. Add test.", "11:45: spec.template.dataset.splits.tst: unknown key. Did you mean test? Known keys: train, validation, test, pinTest, predefined, stratify, groupBy, perClass, folds, fold.", '16:15: spec.template.transfer.epochs: "nine" is not allowed. Allowed: an integer from 1 to 10000.', ]),
    ({"application: MobileNetV2": "application: VGG-16"}, ['14:27: spec.template.model.base.application: "VGG-16" is not allowed. Did you mean VGG16? Allowed: {APPLICATIONS}.', ]),
    ({"      epochs: 9": "      epochs: 9\n      featureCache: {views: 12}"}, ["17:29: spec.template.transfer.featureCache.views: 12 is above epochs 9: each epoch uses one view of an image, so some views would never be used. Use at most 9.", "17:29: spec.template.transfer.featureCache.views: 12 views of an image would be identical, because spec.template.augmentation is off. Remove views, or set spec.template.augmentation.", ]),
    ({"    evaluate:": "    publish: {enabled: false}\n    suspend: true\n    evaluate:"}, ["18:24: spec.template.publish.enabled: must not be false: the search publishes only its best trial. Remove it.", "19:14: spec.template.suspend: true would stop every trial. Set suspend of the search instead.", ]),
    # Sampler and pruner
    ({"sampler: tpe": "sampler: grid", "transfer.optimizer.momentum:\n      uniform: [0.5, 0.99]": "transfer.optimizer.momentum:\n      choice: [0.5, 0.99]"}, ["21:38: spec.space.transfer.optimizer.learningRate: has infinitely many values, but sampler grid tries all of them. Use choice or int, or another sampler.", "22:25: spec.space.model.head.dropout: has infinitely many values, but sampler grid tries all of them. Use choice or int, or another sampler.", ]),
    ({"sampler: tpe": "sampler: cmaes", LEARNING_RATE: "{choice: [0.1]}", DROPOUT: "{choice: [0.1]}"}, ["30:12: spec.sampler: cmaes requires at least 2 parameters with uniform, logUniform or int and without conditions, but found 1. Use tpe.", ]),
    ({BATCH_SIZE: "transfer.epochs: {int: [2, 4]}"}, [f"23:22: spec.space.transfer.epochs: {NO_EPOCHS}", ]),
    ({BATCH_SIZE: "fineTune: {choice: [null, {epochs: 2}]}"}, [f"23:15: spec.space.fineTune: {NO_EPOCHS}", ]),
    ({"epochs: 9": "epochs: 1"}, ["31:11: spec.pruner: asha stops bad trials before their last epoch, but spec.template.transfer.epochs is 1. Set more epochs, or pruner: none.", ]),
    ({"optimizer: {learningRate: 0.001}": "optimizer: {learningRate: 0.001, schedule: {name: cosine}}"}, [f"31:11: spec.pruner: {PRUNER} the schedule cosine of spec.template.transfer.optimizer.schedule depends on the number of epochs. Use constant, exponential, step or inverseTime, {OTHER_PRUNER}", ]),
    ({BATCH_SIZE: "transfer.optimizer.schedule.name: {choice: [constant, cosine]}"}, [f"31:11: spec.pruner: {PRUNER} the schedule cosine of spec.space.transfer.optimizer.schedule.name.choice[1] depends on the number of epochs. Use constant, exponential, step or inverseTime, {OTHER_PRUNER}", ]),
    ({"      metrics: [accuracy, f1]": "      metrics: [accuracy, f1]\n    fineTune: {unfreeze: {steps: [{layers: 1, epochs: 2, learningRate: 0.0001}]}}"}, [f"32:11: spec.pruner: {PRUNER} spec.template.fineTune.unfreeze has steps with their own epochs. Unfreeze all layers at once, {OTHER_PRUNER}", ]),
]
# fmt: on


def edit(changes: dict[str, str]) -> str:
    text = VALID
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def data_of(changes: dict[str, str]) -> dict[str, Any]:
    """Return the changed search as plain data."""
    data: dict[str, Any] = next(read_documents(edit(changes))).data
    return data


def search_of(changes: dict[str, str]) -> TransferSearch:
    return read_search_data(data_of(changes))


@pytest.mark.parametrize(("changes", "problems"), MISTAKES, ids=[problems[0][:60] for _, problems in MISTAKES])
def test_mistake_is_reported_with_position_and_message(
    changes: dict[str, str], problems: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("search.yaml").write_text(edit(changes))
    with pytest.raises(InvalidSpecError) as caught:
        read_searches([Path("search.yaml")])
    expected = [line.replace("{APPLICATIONS}", APPLICATIONS) for line in problems]
    assert [str(problem) for problem in caught.value.problems] == [f"search.yaml:{line}" for line in expected]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # Choices of whole sections, and of nothing.
        {BATCH_SIZE: "fineTune: {choice: [null, {epochs: 2}]}", "asha": "none"},
        # A value that only some combinations refuse.
        {"[96, 96]": "[70, 96]", BATCH_SIZE: "dataset.imageSize: {choice: [[80, 80]]}\n    model.base.application: {choice: [MobileNetV2, Xception]}"},
        # Keys below a short form that is a default.
        {"      metrics: [accuracy, f1]": FINE_TUNE, BATCH_SIZE: "fineTune.unfreeze.layers: {int: [1, 9]}"},
        # The schedule of an earlier stage may depend on its epochs, and its epochs may be a parameter.
        {"{learningRate: 0.001}": "{learningRate: 0.001, schedule: {name: cosine}}", "      metrics: [accuracy, f1]": FINE_TUNE, BATCH_SIZE: "transfer.epochs: {int: [2, 4]}"},
        {"{learningRate: 0.001}": "{learningRate: 0.001, schedule: {name: step, factor: 0.1, atEpochs: [6]}}"},
        {SPLITS: "{perClass: {train: 10, validation: 5, test: 5}}"},
        {SPLITS: "auto"},
        {"sampler: tpe": "sampler: cmaes"},
        {"metric: accuracy": "metric: loss"},
    ],
    ids=str,
)  # fmt: skip
def test_search_is_valid(changes: dict[str, str]) -> None:
    assert search_of(changes).metadata.name == "digits"


def test_spec_of_a_trial_has_its_parameters_and_those_of_the_template() -> None:
    search = search_of(
        {"      metrics: [accuracy, f1]": FINE_TUNE, BATCH_SIZE: "fineTune.unfreeze.layers: {int: [1, 9]}"}
    )
    params = {"transfer.optimizer.name": "sgd", "transfer.optimizer.momentum": 0.9, "fineTune.unfreeze.layers": 3}
    spec, template = trial_spec(search, params), search.spec.template
    expected = template.model_dump(mode="json")
    expected["transfer"]["optimizer"] |= {"name": "sgd", "momentum": 0.9}
    expected["fine_tune"]["unfreeze"] = {"layers": 3}
    assert spec.model_dump(mode="json") == expected
    assert trial_spec(search, {}) == template


def test_choice_replaces_a_section_and_null_removes_it() -> None:
    changes = {
        "      metrics: [accuracy, f1]": FINE_TUNE,
        BATCH_SIZE: "fineTune: {choice: [null, {epochs: 2}]}",
        "asha": "none",
    }
    search = search_of(changes)
    without, short = (trial_spec(search, {"fineTune": value}).fine_tune for value in (None, {"epochs": 2}))
    assert without is None
    assert short is not None
    assert (short.epochs, short.optimizer.learning_rate) == (2, 1e-5)


def test_trial_with_fewer_epochs_may_end_before_its_schedule_and_views() -> None:
    """It keeps its checkpoint, and continues to the next step and the next view."""
    schedule = "{name: step, factor: 0.1, atEpochs: [6]}"
    search = search_of(
        {"optimizer: {learningRate: 0.001}": f"optimizer: {{learningRate: 0.001, schedule: {schedule}}}"}
    )
    spec = trial_spec(search, {"transfer.optimizer.name": "sgd"}, epochs=3)
    assert (spec.transfer.epochs, spec.compute.keep_checkpoint) == (3, True)
    full = trial_spec(search, {"transfer.optimizer.name": "sgd"})
    assert (full.transfer.epochs, full.compute.keep_checkpoint) == (9, False)
    assert spec.transfer.model_copy(update={"epochs": 9}) == full.transfer


def test_refused_combination_names_the_key_and_the_reason() -> None:
    with pytest.raises(InvalidSpecError) as caught:
        trial_spec(search_of({}), {"transfer.optimizer.momentum": 0.9})
    assert str(caught.value) == (
        "spec.transfer.optimizer.momentum: 0.9 applies only to rmsprop and sgd, not to adam. Remove it or change the name."
    )


def test_defaults_that_an_api_server_fills_in_change_no_trial() -> None:
    data = data_of({"      metrics: [accuracy, f1]": FINE_TUNE, BATCH_SIZE: "fineTune.unfreeze.layers: {int: [1, 9]}"})
    template = read_search_data(data).spec.template
    filled = data | {
        "spec": data["spec"] | {"template": template.model_dump(mode="json", by_alias=True, exclude_none=True)}
    }
    params = {"fineTune.unfreeze.layers": 3}
    assert trial_spec(read_search_data(filled), params) == trial_spec(read_search_data(data), params)


def test_parameters_are_drawn_within_their_bounds_and_conditions() -> None:
    space, generator = search_of({}).spec.space, random.Random(1)
    drawn = [draw_parameters(space, generator) for _ in range(200)]
    assert all(1e-4 <= params["transfer.optimizer.learningRate"] <= 1e-1 for params in drawn)
    assert {params["transfer.batchSize"] for params in drawn} <= set(range(16, 65))
    assert all(
        ("transfer.optimizer.momentum" in params) == (params["transfer.optimizer.name"] == "sgd") for params in drawn
    )
    # Half of the values of a logarithmic range are below its geometric mean.
    assert 60 < sum(params["transfer.optimizer.learningRate"] < 10**-2.5 for params in drawn) < 140


def test_every_combination_of_a_finite_space_is_listed_once() -> None:
    changes = {
        LEARNING_RATE: "{choice: [0.1, 0.01]}",
        DROPOUT: "{choice: [0.5]}",
        "[16, 64]": "[16, 18]",
        "      uniform: [0.5, 0.99]\n": "      choice: [0.5, 0.9]\n",
    }
    space = search_of(changes).spec.space
    listed = [json.dumps(params, sort_keys=True) for params in combinations(space)]
    # For adam, momentum does not apply; for sgd, it has two values.
    assert len(listed) == len(set(listed)) == 2 * 3 * (1 + 2)
    assert (count_combinations(space, 100), count_combinations(space, 5)) == (18, 5)
    assert count_combinations(search_of({}).spec.space, 100) is None


def test_parameter_applies_only_if_its_condition_does() -> None:
    changes = {"[adam, sgd]}": "[adam, sgd], when: {transfer.batchSize: 16}}"}
    space = search_of(changes).spec.space
    momentum, name, size = "transfer.optimizer.momentum", "transfer.optimizer.name", "transfer.batchSize"
    names = [parameter for parameter, _ in ordered_parameters(space)]
    assert names.index(size) < names.index(name) < names.index(momentum)
    assert is_active(space[momentum], {name: "sgd", size: 16})
    assert not is_active(space[momentum], {name: "adam", size: 16})
    assert not is_active(space[momentum], {size: 17})


def test_values_are_compared_by_type_and_content() -> None:
    assert is_same(1, 1.0)
    assert not is_same(1, True)
    assert is_same({"a": [1, None]}, {"a": [1.0, None]})
    assert not is_same({"a": [0]}, {"a": [False]})


def test_last_stage_is_fine_tuning_if_there_is_any() -> None:
    assert last_stage(search_of({}).spec.template) == "transfer"
    assert last_stage(search_of({"      metrics: [accuracy, f1]": FINE_TUNE}).spec.template) == "fineTune"


def test_job_that_keeps_its_checkpoint_may_end_before_its_schedule_and_views() -> None:
    """With more epochs, it continues to the next step and the next view."""
    data: dict[str, Any] = next(read_documents(JOB.read_text(encoding="utf-8"))).data
    schedule = {"name": "step", "factor": 0.1, "atEpochs": [25]}
    transfer = data["spec"]["transfer"] | {"featureCache": {"views": 25}, "optimizer": {"schedule": schedule}}
    data["spec"] |= {"transfer": transfer}
    with pytest.raises(InvalidSpecError) as caught:
        read_data(data)
    paths = ["spec.transfer.featureCache.views", "spec.transfer.optimizer.schedule.atEpochs[0]"]
    assert sorted(problem.path for problem in caught.value.problems) == paths
    data["spec"]["compute"] |= {"keepCheckpoint": True}
    assert read_data(data).spec.transfer.epochs == 20


def test_kinds_are_read_by_the_commands_that_run_them() -> None:
    assert [type(spec) for _, spec in read_specs([JOB, FILE])] == [TransferJob, TransferSearch]
    with pytest.raises(InvalidSpecError) as caught:
        read_files([JOB, FILE])
    assert str(caught.value) == (
        f"{FILE}:3:7: kind: is a TransferSearch: run it with topwork search FILE, or topwork submit FILE."
    )
    with pytest.raises(InvalidSpecError) as caught:
        read_searches([JOB])
    assert str(caught.value) == f"{JOB}:3:7: kind: is a TransferJob: run it with topwork run FILE."


def test_overrides_apply_to_the_kind_of_the_document() -> None:
    overrides = ["spec.trials=3", r"spec.space.model\.head\.dropout={choice: [0.1]}", "spec.template.transfer.epochs=4"]
    ((_, search),) = read_searches([FILE], overrides)
    assert (search.spec.trials, search.spec.template.transfer.epochs) == (3, 4)
    assert search.spec.space["model.head.dropout"].choice == (0.1,)
    with pytest.raises(InvalidSpecError) as caught:
        read_specs([JOB, FILE], ["spec.trials=0"])
    assert [str(problem).split(" Known keys")[0] for problem in caught.value.problems] == [
        "--set spec.trials=0: spec.trials: unknown key. Did you mean metrics?",
        "--set spec.trials=0: spec.trials: 0 is not allowed. Allowed: an integer from 1 to 1000.",
    ]


def test_defaults_of_a_namespace_fill_the_template() -> None:
    data = data_of({"    storage: s3://ml-artifacts/topwork\n": ""})
    defaults = SpecDefaults(
        "defaults", flatten_defaults({"storage": "s3://bucket", "compute": {"gpus": 2, "queue": "a"}})
    )
    template = read_search_data(data, defaults).spec.template
    assert (template.storage, template.compute.gpus, template.compute.queue) == ("s3://bucket", 2, "a")
    assert defaults.used == {("spec", "storage"), ("spec", "compute", "gpus"), ("spec", "compute", "queue")}
    wrong = SpecDefaults("defaults", flatten_defaults({"storage": "s3://bucket", "compute": {"gpus": 99}}))
    with pytest.raises(InvalidSpecError) as caught:
        read_search_data(data, wrong)
    assert str(caught.value) == (
        "defaults: spec.template.compute.gpus: 99 is not allowed. Allowed: an integer from 0 to 16."
    )


def test_validate_warns_of_refused_combinations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = tmp_path / "search.yaml"
    search.write_text(edit({"      metrics: [accuracy, f1]": f"{FINE_TUNE}\n    compute: {{gpus: 2}}"}))
    validate([search, JOB])
    output = capsys.readouterr()
    assert output.out.startswith(
        f"{search}: TransferSearch digits ok (16 trials)\n{JOB}: TransferJob cats-vs-dogs ok (digest "
    )
    (warning,) = output.err.splitlines()
    share, _, reason = warning.partition("The first reason: ")
    number, refused = share.removeprefix(f"{search}: Warning: spec.space: ").split(" of 200 random combinations ")
    # Odd batch sizes, and learning rates below that of fine-tuning.
    assert 80 < int(number) < 130
    assert refused == "are refused. Such trials fail at once, but count. "
    assert reason.startswith("spec.template.transfer.batchSize: ")
    assert "is not divisible by spec.template.compute.gpus 2" in reason


def test_grid_that_is_larger_than_the_number_of_trials_is_reported() -> None:
    changes = {"sampler: tpe": "sampler: grid", LEARNING_RATE: "{choice: [0.1, 0.01]}", DROPOUT: "{choice: [0.5]}"}
    changes |= {"      uniform: [0.5, 0.99]\n": "      choice: [0.5, 0.9]\n"}
    assert list(search_warnings(search_of(changes).spec)) == [
        "spec.trials: 16 trials do not cover the grid of 294 combinations. Raise trials."
    ]
    assert list(search_warnings(search_of(changes | {"trials: 16": "trials: 294"}).spec)) == []


def test_validate_does_not_import_optuna() -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['topwork', 'validate', {str(FILE)!r}]\n"
        "from topwork.cli import main\n"
        "try: main()\n"
        "finally: print('optuna' in sys.modules, 'numpy' in sys.modules)"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout.splitlines()[-1] == "False False"
