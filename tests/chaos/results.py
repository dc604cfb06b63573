"""Checks of the results of a run: the same as of another run, and nothing partially visible."""

import json
from typing import Any

import numpy as np
import pytest
from tests.chaos.interrupted_run import JobRun

from topwork.artifacts import MANIFEST_NAME, Manifest
from topwork.clients.s3.storage import Storage


def assert_identical_results(run: JobRun, reference: JobRun) -> tuple[int, int]:
    """Compare all results of two runs, and return the number of compared weights and checkpoints."""
    keys, expected_keys = run.keys(), reference.keys()
    assert keys == expected_keys, f"only in one run: {sorted(set(keys) ^ set(expected_keys))}"
    weights = 0
    for stage in ("transfer", "fine-tune"):
        weights += assert_equal_arrays(
            run.read_weights(run.model_key(stage)), reference.read_weights(reference.model_key(stage))
        )
    published = "models/chaos/1/model.keras"
    weights += assert_equal_arrays(run.read_weights(published), reference.read_weights(published))
    for stage in ("transfer", "fine-tune"):
        result, expected = (job_run.read_json(job_run.result_key(stage)) for job_run in (run, reference))
        assert [result["history"], result["best_epoch"]] == [expected["history"], expected["best_epoch"]]
    assert run.read_json("models/chaos/1/metrics.json") == reference.read_json("models/chaos/1/metrics.json")
    reference_checkpoints = {name.partition("#")[0]: arrays for name, arrays in reference.read_checkpoints().items()}
    common = 0
    for name, arrays in run.read_checkpoints().items():
        if name.partition("#")[0] in reference_checkpoints:
            assert any(group.startswith("optimizer/") for group in arrays)
            assert_equal_arrays(arrays, reference_checkpoints[name.partition("#")[0]])
            common += 1
    return weights, common


def assert_equal_arrays(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> int:
    assert actual.keys() == expected.keys()
    assert actual
    for name, values in actual.items():
        assert values.dtype == expected[name].dtype
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    return len(actual)


def assert_only_complete_objects_are_visible(storage: Storage) -> int:
    """Check that all files of every manifest and every result exist, and return their number. Nodes may be running."""
    visible = 0
    for stored in list(storage.list()):
        name = stored.key.rpartition("/")[2]
        if name in {MANIFEST_NAME, "done.json"}:
            visible += _check_files(storage, stored.key)
    return visible


def _check_files(storage: Storage, key: str) -> int:
    missing: dict[str, int] = {}
    for _ in range(2):
        if (data := storage.read(key)) is None:
            return 0  # a checkpoint that was deleted in the meantime
        files = _named_files(key, json.loads(data))
        missing = {name: size for name, size in files.items() if storage.size(name) != size}
        if not missing:
            return len(files)
    raise AssertionError(f"{key} names {missing}, which do not exist or have another size")


def _named_files(key: str, content: dict[str, Any]) -> dict[str, int]:
    """Return the keys of the files that a manifest or a result names, and their sizes."""
    if key.endswith(MANIFEST_NAME):
        manifest = Manifest.model_validate(content)
        return {manifest.key_of(key.rpartition("/")[0], name): file.size for name, file in manifest.files.items()}
    return {content["key"]: content["file"]["size"]} if key.startswith("stages/") else {}


def print_now(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(text, flush=True)
