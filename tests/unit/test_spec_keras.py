"""What the spec says of Keras without importing it is what the installed Keras does."""

import inspect

import keras
import pytest

from topwork.spec.applications import MIN_SIDE
from topwork.spec.optimizer import OPTIMIZERS_BY_PARAMETER, Optimizer

# Spec key and the name of the parameter in Keras, where they differ.
PARAMETERS = {"beta1": "beta_1", "beta2": "beta_2"}


def test_applications_are_those_of_keras() -> None:
    known = [name for name, member in vars(keras.applications).items() if inspect.isfunction(member)]
    assert sorted(MIN_SIDE) == sorted(known)


@pytest.mark.parametrize(("name", "least"), MIN_SIDE.items())
def test_application_takes_no_smaller_image(name: str, least: int) -> None:
    build = getattr(keras.applications, name)
    with pytest.raises(ValueError, match=f"must be at least {least}x{least}"):
        build(include_top=False, weights=None, input_shape=(least - 1, least, 3))


def test_optimizers_take_the_parameters_that_the_spec_gives_them() -> None:
    names = Optimizer.model_json_schema()["properties"]["name"]["enum"]
    classes = {name.lower(): member for name, member in vars(keras.optimizers).items() if inspect.isclass(member)}
    parameters = {name: inspect.signature(classes[name]).parameters for name in names}
    takers = {key: tuple(name for name in names if PARAMETERS.get(key, key) in parameters[name]) for key in OPTIMIZERS_BY_PARAMETER}
    assert takers == OPTIMIZERS_BY_PARAMETER


@pytest.mark.parametrize(
    "key", ["learning_rate", "weight_decay", "clipnorm", "global_clipnorm", "clipvalue", "gradient_accumulation_steps"]
)
def test_optimizers_all_take_the_other_parameters(key: str) -> None:
    names = Optimizer.model_json_schema()["properties"]["name"]["enum"]
    classes = {name.lower(): member for name, member in vars(keras.optimizers).items() if inspect.isclass(member)}
    assert [name for name in names if key not in inspect.signature(classes[name]).parameters] == []
