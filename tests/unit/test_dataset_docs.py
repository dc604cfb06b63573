"""The settings in docs/datasets.md are valid."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from tests.unit.test_spec_job import with_spec

TEXT = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
SNIPPETS = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
DEFAULTS = {
    "source": {"folder": {"uri": "s3://photos/pets/"}},
    "splits": {"train": 0.8, "test": 0.2},
    "imageSize": [96, 96],
}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_setting_is_valid(snippet: str) -> None:
    (content,) = YAML(typ="safe").load_all(snippet)
    assert content.keys() == {"dataset"}
    with_spec(dataset=DEFAULTS | content["dataset"])
