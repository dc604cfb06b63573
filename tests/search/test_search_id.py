"""The id of a search covers what decides its trials and their order, and nothing else."""

from typing import Any

import pytest
from tests.search.small_searches import DROPOUT, LEARNING_RATE, make_search

from topwork.search.search_id import search_id

SPACE = {LEARNING_RATE: {"logUniform": [1e-5, 1e-1]}, DROPOUT: {"uniform": [0.0, 0.9]}}


def test_the_id_of_a_search_is_its_name_and_a_digest():
    assert search_id(make_search()) == "cats-7242ac0a"


@pytest.mark.parametrize(
    "changes",
    [
        {"trials": 100},
        {"parallel": 4},
        {"budget": {"hours": 1.0}},
        {"suspend": True},
        {"template": {"evaluate": {"gates": [{"metric": "accuracy", "atLeast": 0.9}]}}},
        {"template": {"publish": {"formats": ["onnx"]}}},
        {"template": {"compute": {"gpus": 2}}},
        {"space": dict(reversed(SPACE.items()))},
    ],
)
def test_changes_that_continue_a_search(changes: dict[str, Any]):
    assert search_id(make_search(**changes)) == search_id(make_search())


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"metric": "loss"},
        {"sampler": "random"},
        {"pruner": "asha"},
        {"space": SPACE | {DROPOUT: {"uniform": [0.0, 0.8]}}},
        {"template": {"seed": 1}},
        {"template": {"storage": "s3://bucket/other"}},
        {"template": {"evaluate": {"metrics": ["accuracy"]}}},
        {"template": {"compute": {"precision": "float32"}}},
    ],
)
def test_changes_that_start_a_new_search(changes: dict[str, Any]):
    assert search_id(make_search(**changes)) != search_id(make_search())
