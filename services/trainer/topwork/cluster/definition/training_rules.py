"""CEL rules of the model and of the stages."""

from collections.abc import Iterator, Mapping
from typing import Any

from topwork.cluster.definition.cel import (
    CelRule,
    any_of,
    exactly_one_of,
    format_number,
    format_text,
    mirrors,
    quote,
    text,
)
from topwork.spec import fine_tune, model, optimizer, training
from topwork.spec.messages import join_words
from topwork.spec.optimizer import (
    OPTIMIZERS_BY_PARAMETER,
    REQUIRED_PARAMETERS,
    SCHEDULES_BY_PARAMETER,
    Optimizer,
    Schedule,
)
from topwork.spec.schema.json_schema import EXACTLY_ONE
from topwork.spec.schema.key_types import fields_by_key


@mirrors(optimizer.optimizer_supports_its_parameters)
def _optimizer_parameters() -> Iterator[CelRule]:
    yield from _parameters(Optimizer, OPTIMIZERS_BY_PARAMETER)


@mirrors(optimizer.schedule_supports_its_parameters)
def _schedule_parameters() -> Iterator[CelRule]:
    yield from _parameters(Schedule, SCHEDULES_BY_PARAMETER)


def _parameters(owner: type[Any], supported: Mapping[str, tuple[str, ...]]) -> Iterator[CelRule]:
    """Each parameter is supported by some optimizers or schedules only."""
    fields = fields_by_key(owner)
    for key, names in supported.items():
        value, default = f"self.{key}", fields[key].default
        is_given, shown = f"has({value})", format_number(value)
        if default == ():
            is_given, shown = f"size({value}) > 0", format_text("a list of {}", f"string(size({value}))")
        elif default is not None:
            is_given = f"{value} != {default}"
        elif key == "nesterov":
            shown = f"string({value})"
        yield CelRule(
            f"{is_given} && !(self.name in {any_of(names)})",
            text(
                f"{{}} applies only to {join_words(list(names))}, not to {{}}. Remove it or change the name.",
                shown,
                "self.name",
            ),
            key,
            "FieldValueForbidden",
        )


@mirrors(optimizer.schedule_has_its_required_parameters)
def _required_parameters() -> Iterator[CelRule]:
    descriptions = {key: field.description for key, field in fields_by_key(Schedule).items()}
    for name, keys in REQUIRED_PARAMETERS.items():
        for key in keys:
            missing = f"size(self.{key}) == 0" if key == "atEpochs" else f"!has(self.{key})"
            yield CelRule(
                f"self.name == {quote(name)} && {missing}",
                f"is required if name is {name}. {descriptions[key]}",
                key,
                "FieldValueRequired",
            )


@mirrors(optimizer.step_epochs_increase)
def _step_epochs() -> Iterator[CelRule]:
    # CEL has no index of an item, so the rule searches a list of all possible indices.
    wrong = "self.atEpochs[i] <= self.atEpochs[i - 1]"
    indices = f"{list(range(1, 100))}.filter(i, i < size(self.atEpochs) && {wrong})"
    yield CelRule(
        f"size({indices}) > 0",
        text(
            "{} is not above the previous epoch {}. List epochs in ascending order.",
            f"string(self.atEpochs[{indices}[0]])",
            f"string(self.atEpochs[{indices}[0] - 1])",
        ),
        "atEpochs",
    )


@mirrors(optimizer.one_clipping_method)
def _clipping() -> Iterator[CelRule]:
    both = "has(self.clipnorm) && has(self.globalClipnorm)"
    shown = f'({both} ? "clipnorm and globalClipnorm" : has(self.clipnorm) ? "clipnorm" : "globalClipnorm")'
    message = "cannot be combined with {}: Keras supports one clipping method. Keep one of them."
    yield CelRule(
        "has(self.clipvalue) && (has(self.clipnorm) || has(self.globalClipnorm))",
        text(message, shown),
        "clipvalue",
        "FieldValueForbidden",
    )
    yield CelRule(
        "has(self.globalClipnorm) && has(self.clipnorm) && !has(self.clipvalue)",
        message.format("clipnorm"),
        "globalClipnorm",
        "FieldValueForbidden",
    )


@mirrors(training.warmup_fits_the_epochs)
def _transfer_warmup() -> Iterator[CelRule]:
    yield _warmup()


@mirrors(fine_tune.warmup_fits_the_epochs)
def _fine_tune_warmup() -> Iterator[CelRule]:
    # With unfreeze.steps, which CEL cannot read, epochs are not set.
    yield _warmup()


def _warmup() -> CelRule:
    warmup = "self.optimizer.schedule.warmupEpochs"
    return CelRule(
        f"has(self.epochs) && {warmup} >= double(self.epochs)",
        text(
            "{} is not below epochs {}, so the warmup would never reach the learning rate. Try a tenth of the epochs.",
            format_number(warmup),
            "string(self.epochs)",
        ),
        "optimizer.schedule.warmupEpochs",
    )


@mirrors(model.mix_up_or_cut_mix)
def _mixing() -> Iterator[CelRule]:
    yield CelRule(
        "self.mixUp > 0.0 && self.cutMix > 0.0",
        "cannot be combined with mixUp: both mix the same images and labels. Set one of them to 0.",
        "cutMix",
        "FieldValueForbidden",
    )


@mirrors(model.weights_require_an_application)
def _weights() -> Iterator[CelRule]:
    yield CelRule(
        "has(self.weights) && !has(self.application)",
        "applies only to application: a saved model includes its weights, and a cnn starts from random weights. "
        "Remove it.",
        "weights",
        "FieldValueForbidden",
    )


@mirrors(optimizer.nesterov_requires_momentum)
def _nesterov() -> Iterator[CelRule]:
    yield CelRule(
        'self.name == "sgd" && has(self.nesterov) && self.nesterov && !(has(self.momentum) && self.momentum > 0.0)',
        "true requires momentum, which is 0. Set momentum, such as 0.9.",
        "nesterov",
    )


@mirrors(optimizer.exponential_schedule_decreases)
def _exponential() -> Iterator[CelRule]:
    yield CelRule(
        'self.name == "exponential" && has(self.rate) && self.rate >= 1.0',
        text("{} is not below 1, so the learning rate would never decrease. Try 0.9.", format_number("self.rate")),
        "rate",
    )


@mirrors(fine_tune.custom_optimizer_sets_its_learning_rate)
def _fine_tune_learning_rate() -> Iterator[CelRule]:
    # With unfreeze.steps, which CEL cannot read, epochs are not set.
    yield CelRule(
        "has(self.epochs) && !has(self.optimizer.learningRate)",
        f"is required. The default of {Optimizer().learning_rate} suits a new head but destroys pretrained "
        "weights. Try 1e-05.",
        "optimizer.learningRate",
        "FieldValueRequired",
    )


@mirrors(model.exactly_one_base)
def _base() -> Iterator[CelRule]:
    yield from exactly_one_of(EXACTLY_ONE[model.Base])
