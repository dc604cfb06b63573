"""Malicious model files. Lambda layers and custom objects are tested in unit/test_model_saved_base.py."""

import copy
import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from topwork.errors import DataError
from topwork.model.safe_loading import load_model_safely
from topwork.model.weights import load_weights

MIB = 2**20


@pytest.fixture(scope="module")
def valid_models(tmp_path_factory) -> Path:
    """A directory with a small model as `a.keras` and as `a.h5`."""
    directory = tmp_path_factory.mktemp("models")
    image = keras.Input((8, 8, 3))
    maps = keras.layers.Conv2D(2, 3, name="low")(keras.layers.RandomFlip()(image))
    model = keras.Model(image, keras.layers.Dense(2, name="classes")(keras.layers.Flatten()(maps)))
    model.save(directory / "a.keras")
    model.save(directory / "a.h5")
    return directory


def parts_of(file: Path) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, parts: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def with_config(valid_models: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The valid model as `.keras` with a modified architecture."""
    parts = parts_of(valid_models / "a.keras")
    config = json.loads(parts["config.json"])
    change(config)
    return write_zip(path, parts | {"config.json": json.dumps(config).encode()})


def with_weights(valid_models: Path, path: Path, change: Callable[[h5py.File], None]) -> Path:
    """The valid model as `.keras` with modified weights."""
    parts = parts_of(valid_models / "a.keras")
    file = io.BytesIO(parts["model.weights.h5"])
    with h5py.File(file, "r+") as weights:
        change(weights)
    return write_zip(path, parts | {"model.weights.h5": file.getvalue()})


def layer(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(layer_config for layer_config in config["config"]["layers"] if layer_config["config"]["name"] == name)


def load_error(path: Path) -> str:
    with pytest.raises(DataError) as raised:
        load_model_safely(path)
    return str(raised.value)


# Architectures


def without_shapes(config):
    for layer_config in config["config"]["layers"]:
        layer_config.pop("build_config", None)


def huge_dense(config):
    layer(config, "classes")["config"]["units"] = 10**12


def huge_convolution(config):
    layer(config, "low")["config"]["filters"] = 10**10
    without_shapes(config)


def huge_image(config):
    config["config"]["layers"][0]["config"]["batch_shape"] = [None, 10**6, 10**6, 3]
    without_shapes(config)


def downloads(config):
    """A Keras function that downloads a given URL."""
    function = {"module": "keras.utils", "class_name": "get_file", "registered_name": None}
    layer(config, "low")["config"]["kernel_initializer"] = function | {"config": {"origin": "http://127.0.0.1:1/x"}}


def runs_a_command(config):
    function = {"module": "os", "class_name": "system", "registered_name": None, "config": {"command": "false"}}
    layer(config, "low")["config"]["activation"] = function


def runs_a_builtin(config):
    layer(config, "low")["config"]["activation"] = {"module": "builtins", "class_name": "eval", "config": "1"}


def reads_a_file(config):
    lookup = {"name": "spy", "vocabulary": "/etc/passwd"}
    config["config"]["layers"][1] |= {"module": "keras.layers", "class_name": "StringLookup", "config": lookup}


def unsafe_lambda_in_a_wrapper(config):
    inner = {"module": "keras.layers", "class_name": "Lambda", "config": {"name": "spy", "function": ["bytes", None]}}
    config["config"]["layers"][1] |= {"class_name": "TimeDistributed", "config": {"name": "outer", "layer": inner}}


def deep_nesting(config):
    inner: dict[str, Any] = {"class_name": "Dense"}
    for _ in range(70):
        inner = {"class_name": "Sequential", "config": {"layers": [inner]}}
    config["config"]["layers"][1]["config"] |= {"layer": inner}


def no_layers(config):
    config["config"] = {"layers": 7}


ARCHITECTURES = [
    (huge_dense, "describes layers with 73000000000058 parameters but contains"),
    (huge_convolution, "parameters but contains"),
    (huge_image, "parameters but contains"),
    (downloads, "contains keras.utils.get_file. A base may contain only built-in image layers of Keras"),
    (runs_a_command, "contains os.system"),
    (runs_a_builtin, "contains builtins.eval"),
    (reads_a_file, "contains a StringLookup ("),
    (unsafe_lambda_in_a_wrapper, "contains a Lambda (spy)"),
    (deep_nesting, "contains more than 200 levels of layers"),
    (no_layers, "cannot be loaded as a Keras model"),
]


@pytest.mark.parametrize(("change", "message"), ARCHITECTURES, ids=[change.__name__ for change, _ in ARCHITECTURES])
def test_hostile_architecture_is_rejected(valid_models, tmp_path, change, message):
    assert message in load_error(with_config(valid_models, tmp_path / "b.keras", change))


def test_oversized_architecture_is_rejected_in_h5(valid_models, tmp_path):
    shutil.copy(valid_models / "a.h5", tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        huge_dense(config)
        file.attrs["model_config"] = json.dumps(config)
    assert "describes layers with 73000000000058 parameters" in load_error(tmp_path / "b.h5")


def test_size_check_does_not_affect_loaded_weights(valid_models):
    for name in ("a.keras", "a.h5"):
        model = load_model_safely(valid_models / name)
        assert all(np.isfinite(weight).all() for weight in model.get_weights())
        assert np.abs(model.get_layer("low").get_weights()[0]).sum() > 0
    np.testing.assert_array_equal(model.get_weights()[0], load_model_safely(valid_models / "a.keras").get_weights()[0])
    assert keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)]).count_params() == 9


# Containers


def weights_bomb(valid_models, path):
    write_zip(path, parts_of(valid_models / "a.keras") | {"model.weights.h5": bytes(24 * MIB)}, zipfile.ZIP_DEFLATED)


def architecture_bomb(valid_models, path):
    write_zip(path, parts_of(valid_models / "a.keras") | {"config.json": b" " * 17 * MIB}, zipfile.ZIP_DEFLATED)


def deep_json(valid_models, path):
    write_zip(path, parts_of(valid_models / "a.keras") | {"config.json": b"[" * 200_000})


def additional_files(valid_models, path):
    write_zip(path, parts_of(valid_models / "a.keras") | {"assets/../../evil": b"x"})


def two_architectures(valid_models, path):
    write_zip(path, parts_of(valid_models / "a.keras"))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("config.json", parts_of(valid_models / "a.keras")["config.json"])


class Trace:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickle_in_npz(valid_models, path):
    parts = parts_of(valid_models / "a.keras")
    del parts["model.weights.h5"]
    file = io.BytesIO()
    np.savez(file, low=np.array([Trace(path.parent / "ran")], dtype=object))
    write_zip(path, parts | {"model.weights.npz": file.getvalue()})


def bare_pickle(valid_models, path):
    path.write_bytes(pickle.dumps(Trace(path.parent / "ran")))


def legacy_zip(valid_models, path):
    write_zip(path, {"saved_model.pb": b"x", "variables/variables.index": b"x"})


CONTAINERS = [
    (weights_bomb, "is rejected: it contains model.weights.h5 with 25165824 bytes, compressed to"),
    (architecture_bomb, "is rejected: it contains config.json with 17825792 bytes, compressed to"),
    (deep_json, "is not a Keras model"),
    (additional_files, "Other files are never read."),
    (two_architectures, "each once"),
    (pickle_in_npz, "contains config.json, metadata.json, model.weights.npz, but a .keras file contains"),
    (bare_pickle, "is a pickle file, as from PyTorch, and code in it is never run"),
    (legacy_zip, "is an archive of a TensorFlow SavedModel"),
]


@pytest.mark.parametrize(("write", "message"), CONTAINERS, ids=[write.__name__ for write, _ in CONTAINERS])
def test_hostile_container_is_rejected(valid_models, tmp_path, write, message):
    write(valid_models, tmp_path / "b.keras")
    assert message in load_error(tmp_path / "b.keras")
    assert [path.name for path in tmp_path.iterdir()] == ["b.keras"]


def test_polyglot_file_is_checked_as_the_model_that_is_loaded(valid_models, tmp_path):
    """HDF5 with a Lambda, followed by a zip without one: Keras and the check choose the format by file name."""
    image = keras.Input((8, 8, 3))
    spy = keras.layers.Lambda(lambda x, path=str(tmp_path / "ran"): (Path(path).touch(), x)[1], name="spy")
    model = keras.Model(image, keras.layers.Conv2D(2, 1)(spy(image)))
    (tmp_path / "ran").unlink(missing_ok=True)
    model.save(tmp_path / "b.h5")
    write_zip(tmp_path / "c.keras", parts_of(valid_models / "a.keras"))
    (tmp_path / "b.h5").write_bytes((tmp_path / "b.h5").read_bytes() + (tmp_path / "c.keras").read_bytes())
    assert zipfile.is_zipfile(tmp_path / "b.h5")
    assert "contains a Lambda (spy)" in load_error(tmp_path / "b.h5")
    assert not (tmp_path / "ran").exists()


# Arrays


def find_array(file: h5py.File) -> tuple[h5py.Group, str]:
    """Return the group and name of an array."""
    array_names: list[str] = []
    file.visititems(lambda name, item: array_names.append(name) if isinstance(item, h5py.Dataset) else None)
    return file[array_names[-1]].parent, array_names[-1].rsplit("/", 1)[-1]


def replace_array(file: h5py.File, make: Callable[[h5py.Group, str], object]) -> None:
    group, name = find_array(file)
    del group[name]
    make(group, name)


def external_link(group, name):
    group[name] = h5py.ExternalLink("/etc/passwd", "/")


def soft_link(group, name):
    group[name] = h5py.SoftLink("/")


def external_storage(group, name):
    group.create_dataset(name, (100,), "u1", external=[("/etc/passwd", 0, 100)])


def virtual_dataset(group, name):
    layout = h5py.VirtualLayout((2,), "f4")
    layout[0] = h5py.VirtualSource("/etc/passwd", "x", (1,))[0]
    group.create_virtual_dataset(name, layout)


def huge_shape(group, name):
    group.create_dataset(name, (10**6, 10**6), "f4", chunks=(1000, 1000), compression="gzip")


def packed_zeros(group, name):
    group.create_dataset(name, data=np.zeros(10_000_000, "f4"), compression="gzip", compression_opts=9)


def strings(group, name):
    group.create_dataset(name, data=["text"], dtype=h5py.string_dtype())


def references(group, name):
    group.create_dataset(name, data=[group.ref], dtype=h5py.ref_dtype)


def unknown_filter(group, name):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((2,))
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((2,))
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.NATIVE_FLOAT, space, properties)


def named_type(group, name):
    group[name] = np.dtype("f4")


ARRAYS = [
    (external_link, "contains a link"),
    (soft_link, "contains a link"),
    (external_storage, "contains values stored in another file"),
    (virtual_dataset, "contains values stored in another file"),
    (huge_shape, "with 1000000x1000000 values in 0 bytes"),
    (packed_zeros, "with 10000000 values in"),
    (strings, "contains values of type object"),
    (references, "contains values of type object"),
    (unknown_filter, "contains values compressed with an unknown filter (32015)"),
    (named_type, "contains a named data type"),
]


@pytest.mark.parametrize(("make", "message"), ARRAYS, ids=[make.__name__ for make, _ in ARRAYS])
def test_hostile_arrays_are_rejected_in_models_and_weights(valid_models, tmp_path, make, message):
    path = with_weights(valid_models, tmp_path / "b.keras", lambda file: replace_array(file, make))
    assert message in load_error(path)
    shutil.copy(valid_models / "a.h5", tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        replace_array(file, make)
    assert message in load_error(tmp_path / "b.h5")
    (tmp_path / "c.weights.h5").write_bytes(parts_of(path)["model.weights.h5"])
    with pytest.raises(DataError) as raised:
        load_weights(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), tmp_path / "c.weights.h5", "Any")
    assert message in str(raised.value)


def test_circular_groups_terminate(valid_models, tmp_path):
    def circle(file):
        file["circle"] = file["/"]

    path = with_weights(valid_models, tmp_path / "b.keras", circle)
    assert load_model_safely(path).count_params() == load_model_safely(valid_models / "a.keras").count_params()


@pytest.mark.parametrize("name", ["a.keras", "a.h5"])
def test_any_corruption_gives_a_clear_error(valid_models, tmp_path, name):
    """Corrupts the container and the architecture; the structure of HDF5 is corrupted in another test."""
    rng = random.Random(3)
    content = (valid_models / name).read_bytes()
    json_start = content.find(b'{"')
    for _ in range(12):
        data = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            data[rng.choice([rng.randrange(len(data)), json_start + rng.randrange(2000)])] = rng.randrange(256)
        (tmp_path / name).write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        try:
            load_model_safely(tmp_path / name)
        except DataError as error:
            assert str(error).startswith(name)


def test_any_mutated_architecture_gives_a_clear_error(valid_models, tmp_path):
    """Replaces values of the architecture: any error that a layer raises is reported as an error in the file."""
    rng = random.Random(4)
    parts = parts_of(valid_models / "a.keras")
    config = json.loads(parts["config.json"])
    for _ in range(25):
        changed = copy.deepcopy(config)
        node: Any = changed["config"]["layers"]
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key, parent = rng.choice(keys), node
            node = node[key]
            if rng.random() < 0.3:
                break
        parent[key] = rng.choice([None, -1, 10**30, 1e308, "", "x" * 50, [], {}, [[]], {"a": []}, True])
        write_zip(tmp_path / "b.keras", parts | {"config.json": json.dumps(changed).encode()})
        try:
            load_model_safely(tmp_path / "b.keras")
        except DataError as error:
            assert str(error).startswith("b.keras")
