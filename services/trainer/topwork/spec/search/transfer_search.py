"""TransferSearch, the spec of a hyperparameter search: a template of a TransferJob, and the values to try."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StringConstraints

from topwork.spec.evaluation import MetricName
from topwork.spec.job import JobSpec, Metadata
from topwork.spec.messages import format_value, join_words
from topwork.spec.search.path_checks import check_combined_conditions, check_conditions, check_paths
from topwork.spec.search.space import RefusedError, is_same, last_stage, set_parameters, values_of
from topwork.spec.search.value_checks import check_continuation, check_values
from topwork.spec.spec_model import SpecModel, ValueDescription, Violation, rule

SearchMetric = Literal[MetricName, "loss"]
Sampler = Literal["tpe", "random", "grid", "cmaes"]
Pruner = Literal["asha", "median", "none"]
Number = Annotated[StrictFloat, Field(ge=-1e12, le=1e12)]
Positive = Annotated[StrictFloat, Field(gt=0.0, le=1e12)]
Integer = Annotated[StrictInt, Field(ge=-(10**12), le=10**12)]
PARAMETER_KINDS = ("uniform", "logUniform", "int", "choice")
ParameterPath = Annotated[
    str,
    StringConstraints(max_length=200, pattern=r"^[a-z][A-Za-z0-9.\[\]]*$"),
    ValueDescription("the path of a key of the template, such as transfer.optimizer.learningRate"),
]
Choice = Annotated[Any, ValueDescription("a value that the template allows at this path")]


class Parameter(SpecModel):
    """The values of one parameter. Exactly one of uniform, logUniform, int and choice is set."""

    uniform: tuple[Number, Number] | None = Field(
        default=None, description="Smallest and largest value, drawn uniformly."
    )
    log_uniform: tuple[Positive, Positive] | None = Field(
        default=None, description="Smallest and largest value, both above 0, drawn uniformly on a logarithmic scale."
    )
    int: tuple[Integer, Integer] | None = Field(
        default=None, description="Smallest and largest integer, drawn uniformly."
    )
    choice: Annotated[tuple[Choice, ...], Field(min_length=1, max_length=100)] | None = Field(
        default=None,
        description="Values to choose from: numbers, names, lists, or sections, which replace the whole section of the "
        "template. null removes the key.",
    )
    when: dict[ParameterPath, Choice] = Field(
        default={},
        max_length=10,
        description="Conditions: paths of other parameters, with int or choice, and the value that each must have. "
        "Otherwise, the value of the template applies.",
    )

    @property
    def kinds(self) -> dict[str, tuple[Any, ...]]:
        """The bounds or choices, by the key that is set; exactly one in a valid parameter."""
        values = (self.uniform, self.log_uniform, self.int, self.choice)
        return {kind: value for kind, value in zip(PARAMETER_KINDS, values, strict=True) if value is not None}


class Budget(SpecModel):
    """Limits of a search besides the number of trials. When one is reached, no further trial starts."""

    gpu_hours: Annotated[StrictFloat, Field(gt=0.0, le=1e6)] | None = Field(
        default=None, description="GPU hours of all trials together: number of GPUs times hours."
    )
    hours: Annotated[StrictFloat, Field(gt=0.0, le=1e5)] | None = Field(
        default=None, description="Hours since the search started."
    )


class SearchSpec(SpecModel):
    """The desired search: template, space, metric, number of trials and how to choose them."""

    template: JobSpec = Field(description="Spec of the TransferJob of each trial, and of the published model.")
    space: dict[ParameterPath, Parameter] = Field(
        min_length=1,
        max_length=50,
        description="Parameters by their paths below template, such as transfer.optimizer.learningRate.",
    )
    metric: SearchMetric = Field(
        default="accuracy",
        description="Metric on the validation split to optimize: loss, or a metric of template.evaluate.metrics.",
    )
    trials: StrictInt = Field(default=20, ge=1, le=1000, description="Number of trials.")
    parallel: StrictInt = Field(
        default=1, ge=1, le=100, description="Maximum number of trials that run at the same time in a cluster."
    )
    budget: Budget = Field(default=Budget(), description="Limits of the cost of the search.")
    sampler: Sampler = Field(
        default="tpe",
        description="How to choose the values of the next trial: tpe (tree-structured Parzen estimator), random, grid, "
        "or cmaes.",
    )
    pruner: Pruner = Field(
        default="none",
        description="How to stop bad trials early. asha trains all trials for a few epochs, and continues the best "
        "ones; median stops trials that are worse than the median; none trains all trials completely.",
    )
    seed: StrictInt = Field(default=42, ge=0, le=2**31 - 1, description="Seed of the sampler.")
    suspend: StrictBool = Field(
        default=False,
        description="Whether to stop all trials with a checkpoint and free their GPUs; false resumes them. Applies to "
        "TransferSearches in a cluster.",
    )


class TransferSearch(SpecModel):
    """A TransferSearch trains TransferJobs with different hyperparameters, and publishes the best model."""

    api_version: Literal["topwork.dev/v1alpha1"] = Field(description="Version of the spec format.")
    kind: Literal["TransferSearch"] = Field(description="Kind of the object.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations of the search.")
    spec: SearchSpec = Field(description="The desired search.")


@rule(Parameter)
def exactly_one_kind(parameter: Parameter) -> Iterator[Violation]:
    """The values of a parameter are a range or a list."""
    given = list(parameter.kinds)
    if len(given) != 1:
        found = f"{join_words(given)} are set" if given else "none is set"
        yield Violation("", f"{found}, but exactly one of {join_words(list(PARAMETER_KINDS))} is required.")


@rule(Parameter)
def bounds_ascend(parameter: Parameter) -> Iterator[Violation]:
    """A range needs at least two values."""
    for kind, bounds in parameter.kinds.items():
        if kind != "choice" and bounds[0] >= bounds[1]:
            yield Violation(
                kind,
                f"[{format_value(bounds[0])}, {format_value(bounds[1])}] is not a range. Expected [smallest, largest] "
                "with the smallest value below the largest.",
            )


@rule(Parameter)
def choices_are_unique(parameter: Parameter) -> Iterator[Violation]:
    """A repeated choice would be tried more often than others."""
    choices = parameter.choice or ()
    for index, value in enumerate(choices):
        if any(is_same(value, other) for other in choices[:index]):
            yield Violation(f"choice.{index}", f"{format_value(value)} is listed twice. Remove one of them.")


@rule(SearchSpec)
def parameters_are_keys_of_the_template(search: SearchSpec) -> Iterator[Violation]:
    """A parameter is a key that can change the trained weights. Trials share their images, seed and storage."""
    stages = ("transfer", "fineTune") if last_stage(search.template) == "transfer" else ("fineTune",)
    yield from check_paths(search.space, stages if search.pruner != "none" else ())


@rule(SearchSpec)
def conditions_can_be_met(search: SearchSpec) -> Iterator[Violation]:
    """A condition refers to another parameter, and to one of its values. All conditions can be met at once."""
    violations = list(check_conditions(search.space))
    yield from violations or check_combined_conditions(search.space)


@rule(SearchSpec)
def values_are_accepted_by_the_template(search: SearchSpec) -> Iterator[Violation]:
    """Each bound and each choice is valid in at least one combination. `topwork validate` warns if others are not."""
    if _is_valid(search):
        yield from check_values(search.template, search.space)


@rule(SearchSpec)
def metric_is_evaluated(search: SearchSpec) -> Iterator[Violation]:
    """The metric is measured after each trial."""
    metrics = search.template.evaluate.metrics
    if search.metric not in {"loss", *metrics}:
        yield Violation(
            "metric",
            f"{search.metric} is not in spec.template.evaluate.metrics: {', '.join(metrics)}. Add it there, or use "
            "loss.",
        )


@rule(SearchSpec)
def loss_is_the_same_in_all_trials(search: SearchSpec) -> Iterator[Violation]:
    """Values of different loss functions can't be compared."""
    if search.metric == "loss":
        for name in search.space:
            if name.split(".")[:2] == ["transfer", "loss"][: len(name.split("."))]:
                yield Violation(
                    "metric",
                    f"loss is not comparable between trials, because {name} changes the loss function. Use accuracy or "
                    "another metric.",
                )


@rule(SearchSpec)
def trials_are_compared_on_validation(search: SearchSpec) -> Iterator[Violation]:
    """The images that select the best trial can't tell how good it is. Only the test split can."""
    splits, path = search.template.dataset.split_settings, ("template", "dataset", "splits")
    if splits.folds:
        yield Violation(
            (*path, "folds"),
            "cross-validation is not supported in a search: trials are compared on one validation split. Use "
            "fractions, such as {train: 0.8, validation: 0.1, test: 0.1}.",
        )
        return
    if not splits.has_validation:
        yield Violation(path, "has no validation split, on which trials are compared. Add validation.")
    if not (splits.test is not None or splits.predefined or splits.per_class or splits.pin_test):
        yield Violation(
            path,
            "has no test split. The best trial is selected on the validation split, so only other images can tell how "
            "good it is. Add test.",
        )


@rule(SearchSpec)
def search_publishes_its_best_trial(search: SearchSpec) -> Iterator[Violation]:
    """The keys publish.enabled and suspend of the template would apply to every trial."""
    if not search.template.publish.enabled:
        yield Violation(
            ("template", "publish", "enabled"),
            "must not be false: the search publishes only its best trial. Remove it.",
        )
    if search.template.suspend:
        yield Violation(("template", "suspend"), "true would stop every trial. Set suspend of the search instead.")


@rule(SearchSpec)
def trials_can_be_continued(search: SearchSpec) -> Iterator[Violation]:
    """With a pruner, a trial that trained a few epochs continues as if it had been started with more."""
    if search.pruner != "none" and _is_valid(search):
        yield from check_continuation(search.template, search.space, search.pruner)


@rule(SearchSpec)
def grid_is_finite(search: SearchSpec) -> Iterator[Violation]:
    """A grid tries every combination."""
    if search.sampler == "grid":
        for name, parameter in search.space.items():
            if values_of(parameter) is None:
                yield Violation(
                    ("space", name),
                    "has infinitely many values, but sampler grid tries all of them. Use choice or int, or another "
                    "sampler.",
                )


@rule(SearchSpec)
def cmaes_has_numbers(search: SearchSpec) -> Iterator[Violation]:
    """CMA-ES searches a space of at least two dimensions. It draws all other parameters at random."""
    numeric = [name for name, parameter in search.space.items() if parameter.choice is None and not parameter.when]
    if search.sampler == "cmaes" and len(numeric) < 2:
        yield Violation(
            "sampler",
            "cmaes requires at least 2 parameters with uniform, logUniform or int and without conditions, but found "
            f"{len(numeric)}. Use tpe.",
        )


def _is_valid(search: SearchSpec) -> bool:
    """Return whether values can be checked: the template alone, the paths and the conditions have no violations."""
    if any(parameters_are_keys_of_the_template(search)) or any(conditions_can_be_met(search)):
        return False
    try:
        set_parameters(search.template, {})
    except RefusedError:
        return False
    return True
