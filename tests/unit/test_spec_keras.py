"""Facts about Keras in the spec match the installed Keras."""

import inspect

import keras
import pytest

from topwork.model.backbones import find_architecture
from topwork.spec.applications import MIN_SIDE, NOT_DOWNLOADED
from topwork.spec.optimizer import OPTIMIZERS_BY_PARAMETER, Optimizer

# Keras parameter names of spec keys whose names differ.
PARAMETERS = {"beta1": "beta_1", "beta2": "beta_2"}


def test_applications_match_keras_applications() -> None:
    known = [name for name, member in vars(keras.applications).items() if inspect.isfunction(member)]
    assert sorted(MIN_SIDE.keys() - NOT_DOWNLOADED.keys()) == sorted(known)


@pytest.mark.parametrize(("name", "minimum"), MIN_SIDE.items())
def test_application_rejects_smaller_images(name: str, minimum: int) -> None:
    build = find_architecture(name)
    with pytest.raises(ValueError, match=f"must be at least {minimum}x{minimum}"):
        build(include_top=False, weights=None, input_shape=(minimum - 1, minimum, 3))


def test_optional_optimizer_parameters_match_keras() -> None:
    names = Optimizer.model_json_schema()["properties"]["name"]["enum"]
    classes = {name.lower(): member for name, member in vars(keras.optimizers).items() if inspect.isclass(member)}
    parameters = {name: inspect.signature(classes[name]).parameters for name in names}
    supported = {
        key: tuple(name for name in names if PARAMETERS.get(key, key) in parameters[name])
        for key in OPTIMIZERS_BY_PARAMETER
    }
    assert supported == OPTIMIZERS_BY_PARAMETER


@pytest.mark.parametrize(
    "key", ["learning_rate", "weight_decay", "clipnorm", "global_clipnorm", "clipvalue", "gradient_accumulation_steps"]
)
def test_other_optimizer_parameters_are_supported_by_all_optimizers(key: str) -> None:
    names = Optimizer.model_json_schema()["properties"]["name"]["enum"]
    classes = {name.lower(): member for name, member in vars(keras.optimizers).items() if inspect.isclass(member)}
    assert [name for name in names if key not in inspect.signature(classes[name]).parameters] == []
