"""Saved models as a base: cutting and cloning. Code in a saved model is never run."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

from topwork.errors import DataError
from topwork.model.classifier import with_precision
from topwork.model.layer_tree import leaf_layers
from topwork.model.saved_base import load_saved_base

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.float32)


def functional():
    image = keras.Input((16, 16, 3), name="pixels_of_a")
    left = keras.layers.Conv2D(3, 3, padding="same", name="left")(image)
    right = keras.layers.Conv2D(3, 1, name="right")(image / 255.0)
    both = keras.layers.Concatenate(name="both")([left, right])
    deep = keras.layers.BatchNormalization(name="norm")(both)
    flat = keras.layers.Flatten(name="flat")(deep)
    top = keras.layers.Dense(4, activation="softmax", name="classes")(keras.layers.Dropout(0.5)(flat))
    return keras.Model(image, top)


def sequential():
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(3, 3, name="first"),
            keras.layers.GlobalMaxPooling2D(name="pool"),
            keras.layers.Dense(5, name="dense"),
            keras.layers.Dense(2, name="classes"),
        ]
    )


def topwork_model():
    image = keras.Input((16, 16, 3), name="image")
    inner = keras.Input((16, 16, 3))
    maps = keras.layers.Conv2D(2, 3, name="low")(inner)
    base = keras.Model(inner, keras.layers.Conv2D(4, 3, name="high")(maps), name="base")
    features = base(keras.layers.Rescaling(1 / 255, name="input_scaling")(keras.ops.flip(image, axis=-1)))
    vector = keras.layers.GlobalAveragePooling2D(name="pooling")(features)
    logits = keras.layers.Dense(1, name="logits")(vector)
    return keras.Model(image, keras.layers.Activation("sigmoid", name="probabilities")(logits))


def sequential_of(*layers, name, size=(16, 16, 3)):
    return keras.Sequential([keras.Input(size), *layers], name=name)


def nested_three_deep():
    """Three nested models of different kinds; the innermost has branches and a shared layer."""
    pixels = keras.Input((16, 16, 3))
    left = keras.layers.Conv2D(3, 3, padding="same", name="left")(pixels)
    right = keras.layers.Conv2D(3, 1, activation="relu", name="right")(pixels)
    shared = keras.layers.Conv2D(4, 3, padding="same", name="shared")
    both = keras.layers.Concatenate(name="both")([shared(left), shared(right)])
    innermost = keras.Model(pixels, keras.layers.BatchNormalization(name="norm")(both), name="innermost")
    middle = sequential_of(
        keras.layers.Rescaling(1 / 255, name="scaling"),
        innermost,
        keras.layers.DepthwiseConv2D(3, padding="same", name="deep"),
        name="middle",
    )
    image = keras.Input((16, 16, 3), name="image")
    maps = keras.layers.MaxPooling2D(name="pool")(middle(image))
    vector = keras.layers.GlobalAveragePooling2D(name="average")(maps)
    top = sequential_of(
        keras.layers.Dense(6, name="hidden"), keras.layers.Dense(3, name="classes"), name="top", size=(8,)
    )
    model = keras.Model(image, top(vector), name="outer")
    random = np.random.default_rng(1)
    # Statistics that a newly built base would not have.
    model.set_weights([np.abs(random.normal(0.5, 0.3, weight.shape)) for weight in model.get_weights()])
    return model


def compute_layer_output(model, name):
    """Compute the output of a layer in nested_three_deep without topwork."""
    image = keras.Input((16, 16, 3))
    scaled = model.get_layer("middle").get_layer("scaling")(image)
    innermost = model.get_layer("middle").get_layer("innermost")
    outputs = {
        "left": lambda: innermost.get_layer("left")(scaled),
        "both": lambda: keras.Model(innermost.inputs, innermost.get_layer("both").output)(scaled),
        "norm": lambda: innermost(scaled),
        "innermost": lambda: innermost(scaled),
        "deep": lambda: model.get_layer("middle")(image),
        "middle": lambda: model.get_layer("middle")(image),
        "average": lambda: keras.Model(model.inputs, model.get_layer("average").output)(image),
        "hidden": lambda: model.get_layer("top").get_layer("hidden")(
            keras.Model(model.inputs, model.get_layer("average").output)(image)
        ),
    }
    return keras.Model(image, outputs[name]()).predict_on_batch(PIXELS)


def reference(model, layer):
    return keras.Model(model.inputs, model.get_layer(layer).output).predict_on_batch(PIXELS)


@pytest.mark.parametrize(
    ("make", "cut_at", "same_as"),
    [
        (functional, None, "dropout"),
        (functional, "both", "both"),
        (functional, -3, "flat"),
        (functional, 1, "left"),
        (sequential, None, "dense"),
        (sequential, 0, "first"),
        (sequential, "pool", "pool"),
        (topwork_model, "pooling", "pooling"),
        (topwork_model, -3, "pooling"),
    ],
)
def test_base_output_equals_the_model_output_at_the_cut_layer(make, cut_at, same_as, tmp_path):
    keras.utils.clear_session()
    model = make()
    path = tmp_path / ("a.h5" if make is sequential else "a.keras")
    model.save(path)
    content = path.read_bytes()
    base = load_saved_base(path, cut_at, (16, 16))
    assert base.name == "base"
    np.testing.assert_allclose(base.predict_on_batch(PIXELS), reference(model, same_as), rtol=1e-5, atol=1e-6)
    assert path.read_bytes() == content


def test_topwork_model_is_cut_at_its_base_and_keeps_its_scaling(tmp_path):
    model = topwork_model()
    model.save(tmp_path / "a.keras")
    base = load_saved_base(tmp_path / "a.keras", None, (16, 16))
    scaled = PIXELS[..., ::-1] / np.float32(255)
    expected = model.get_layer("base").predict_on_batch(scaled)
    np.testing.assert_allclose(base.predict_on_batch(PIXELS), expected, rtol=1e-5, atol=1e-6)
    low = load_saved_base(tmp_path / "a.keras", "low", (16, 16))
    inner = model.get_layer("base")
    expected = keras.Model(inner.inputs, inner.get_layer("low").output).predict_on_batch(scaled)
    np.testing.assert_allclose(low.predict_on_batch(PIXELS), expected, rtol=1e-5, atol=1e-6)


def test_model_without_fixed_size_accepts_any_size(tmp_path):
    image = keras.Input((None, None, 3))
    maps = keras.layers.Conv2D(2, 3, strides=2, name="deep")(image)
    keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalMaxPooling2D()(maps))).save(tmp_path / "a.keras")
    assert load_saved_base(tmp_path / "a.keras", "deep", (33, 21)).output_shape == (None, 16, 10, 2)


def test_cut_below_flatten_accepts_another_size(tmp_path):
    model = functional()
    model.save(tmp_path / "a.keras")
    base = load_saved_base(tmp_path / "a.keras", "both", (8, 12))
    assert base.output_shape == (None, 8, 12, 6)
    expected = reference(model, "both")[:, 1:7, 1:11]
    actual = base.predict_on_batch(PIXELS[:, :8, :12])[:, 1:7, 1:11]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize(
    ("cut_at", "same_as"),
    [
        ("left", "left"),
        ("middle/innermost/both", "both"),
        ("norm", "norm"),
        ("innermost", "innermost"),
        ("deep", "deep"),
        ("middle", "middle"),
        (-2, "average"),
        ("hidden", "hidden"),
        # By default, the base ends before the last layer with weights, which is in a nested model here.
        (None, "hidden"),
    ],
)
def test_nested_models_are_cut_at_any_depth(tmp_path, suffix, cut_at, same_as):
    keras.utils.clear_session()
    model = nested_three_deep()
    path = tmp_path / f"a.{suffix}"
    model.save(path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    base = load_saved_base(path, cut_at, (16, 16))
    np.testing.assert_allclose(
        base.predict_on_batch(PIXELS), compute_layer_output(model, same_as), rtol=1e-4, atol=1e-5
    )
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_training_the_base_does_not_change_the_model_or_its_file(tmp_path):
    model = nested_three_deep()
    path = tmp_path / "a.keras"
    model.save(path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    base = load_saved_base(path, "average", (16, 16))
    classifier = keras.Sequential([base, keras.layers.Dense(2, activation="softmax")])
    classifier.compile(optimizer=keras.optimizers.SGD(0.1), loss="sparse_categorical_crossentropy")
    initial_weights = base.get_weights()
    classifier.fit(PIXELS, np.array([0, 1]), epochs=2, verbose=0)
    assert any((a != b).any() for a, b in zip(initial_weights, base.get_weights(), strict=True))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    reloaded_weights = load_saved_base(path, "average", (16, 16)).get_weights()
    for expected, actual in zip(initial_weights, reloaded_weights, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_shared_layer_stays_shared(tmp_path):
    nested_three_deep().save(tmp_path / "a.keras")
    base = load_saved_base(tmp_path / "a.keras", "both", (16, 16))
    assert sum(weight.path.endswith("shared/kernel") for weight in base.weights) == 1
    # A layer that is called twice returns the output of its last call.
    at_shared = load_saved_base(tmp_path / "a.keras", "shared", (16, 16))
    assert at_shared.output_shape == (None, 16, 16, 4)


def test_nested_model_without_dense_layers_accepts_another_size(tmp_path):
    model = nested_three_deep()
    model.save(tmp_path / "a.keras")
    base = load_saved_base(tmp_path / "a.keras", "average", (24, 32))
    assert base.output_shape == (None, 8)
    pixels = np.tile(PIXELS[:, :8, :8], (1, 3, 4, 1))
    assert base.predict_on_batch(pixels).shape == (2, 8)
    deep = load_saved_base(tmp_path / "a.keras", "middle", (8, 8)).predict_on_batch(PIXELS[:, :8, :8])
    np.testing.assert_allclose(deep[:, :5, :5], compute_layer_output(model, "deep")[:, :5, :5], rtol=1e-4, atol=1e-5)


def test_preprocessing_layers_are_kept_and_augmentation_layers_removed(tmp_path):
    normalization = keras.layers.Normalization(name="normalization")
    normalization.adapt(PIXELS)
    augmentation = sequential_of(
        keras.layers.RandomFlip(name="flip"), keras.layers.RandomRotation(0.2, name="rotation"), name="augmentation"
    )
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            augmentation,
            keras.layers.Resizing(12, 12, name="resizing"),
            normalization,
            keras.layers.RandomContrast(0.5),
            keras.layers.Conv2D(2, 3, name="convolution"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, name="classes"),
        ]
    )
    model.save(tmp_path / "a.keras")
    base = load_saved_base(tmp_path / "a.keras", "convolution", (16, 16))
    expected = reference(model, "convolution")
    np.testing.assert_allclose(base.predict_on_batch(PIXELS), expected, rtol=1e-4, atol=1e-5)
    # Also in training: only spec.augmentation augments images.
    np.testing.assert_allclose(base(PIXELS, training=True), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        with_precision(classifier_on(base), "mixed_bfloat16").predict_on_batch(PIXELS),
        classifier_on(base).predict_on_batch(PIXELS),
        atol=0.05,
    )
    with pytest.raises(DataError, match=r"cutAt is rotation, but a\.keras up to that layer has no layer with weights"):
        load_saved_base(tmp_path / "a.keras", "rotation", (16, 16))


def classifier_on(base):
    image = keras.Input((16, 16, 3), name="image")
    return keras.Model(image, keras.layers.Flatten(name="flatten")(base(image)), name="classifier")


def test_half_precision_model_becomes_a_float32_base(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        inner = sequential_of(keras.layers.Conv2D(3, 3, name="inner"), name="nested")
        image = keras.Input((16, 16, 3))
        maps = keras.layers.TimeDistributed(keras.layers.Dense(3), name="wrapped")(inner(image))
        model = keras.Model(image, keras.layers.Dense(2)(keras.layers.Flatten()(maps)))
        model.save(tmp_path / "a.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    base = load_saved_base(tmp_path / "a.keras", "wrapped", (16, 16))
    layers = [layer for layer in leaf_layers(base) if layer.weights]
    assert {layer.compute_dtype for layer in [*layers, layers[-1].layer]} == {"float32"}
    assert base.predict_on_batch(PIXELS).dtype == np.float32
    expected = keras.Model(model.inputs, model.get_layer("wrapped").output).predict_on_batch(PIXELS)
    np.testing.assert_allclose(base.predict_on_batch(PIXELS), expected, rtol=0.05, atol=2)


def load_error(path, cut_at=None, size=(16, 16)):
    with pytest.raises(DataError) as error:
        load_saved_base(path, cut_at, size)
    return str(error.value)


def test_error_messages_name_the_fix(tmp_path):
    path = tmp_path / "a.keras"
    functional().save(path)
    assert load_error(path, "classes", (32, 24)) == (
        "a.keras was built for images of 16x16 and does not support spec.dataset.imageSize [32, 24]. Use [16, 16]."
    )
    assert load_error(path, "borth") == (
        "spec.model.base.saved.cutAt is borth, but a.keras has no layer of that name. Did you mean both or norm?"
    )
    assert load_error(path, 50).endswith("but a.keras has 8 layers. Use an index between -8 and 7.")
    (tmp_path / "b.keras").write_bytes(b"no model")
    assert load_error(tmp_path / "b.keras").startswith(
        "b.keras is not a Keras model. Expected a .keras file, or a legacy"
    )
    functional().save_weights(tmp_path / "c.weights.h5")
    assert load_error(tmp_path / "c.weights.h5").startswith(
        "c.weights.h5 contains only weights, as from model.save_weights. Save the complete model: "
    )
    gray = keras.Input((16, 16, 1))
    keras.Model(gray, keras.layers.Conv2D(1, 1)(gray)).save(tmp_path / "d.keras")
    assert load_error(tmp_path / "d.keras").startswith(
        "d.keras expects input of shape (None, 16, 16, 1), but a base takes one batch of RGB"
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_model_with_code_is_rejected_and_never_run(tmp_path, suffix, nested):
    ran = tmp_path / "ran"
    image = keras.Input((16, 16, 3))
    spy = keras.layers.Lambda(lambda x, path=str(ran): (Path(path).touch(), x)[1], output_shape=(16, 16, 3), name="spy")
    within = sequential_of(spy, name="within") if nested else spy
    model = keras.Model(image, keras.layers.Conv2D(2, 1)(within(image)))
    model.save(tmp_path / f"a.{suffix}")
    model.predict_on_batch(PIXELS)
    # The layer leaves a trace whenever it runs.
    assert ran.exists()
    ran.unlink(missing_ok=True)
    assert "a Lambda (spy)" in load_error(tmp_path / f"a.{suffix}")
    assert not ran.exists()


@keras.saving.register_keras_serializable("elsewhere")
class Writes(keras.layers.Layer):
    """A registered custom layer that leaves a trace when it is constructed."""

    trace = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.trace:
            self.trace.touch()

    def call(self, inputs):
        return inputs


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_custom_layer_is_rejected_and_never_constructed(tmp_path, suffix, monkeypatch):
    image = keras.Input((16, 16, 3))
    keras.Model(image, keras.layers.Conv2D(2, 1)(Writes()(image))).save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(Writes, "trace", tmp_path / "made")
    assert load_error(tmp_path / f"a.{suffix}").startswith(f"a.{suffix} contains ")
    assert "Writes" in load_error(tmp_path / f"a.{suffix}")
    assert not (tmp_path / "made").exists()


def test_registered_custom_layer_is_rejected_regardless_of_its_module_in_the_file(tmp_path, monkeypatch):
    image = keras.Input((16, 16, 3))
    keras.Model(image, keras.layers.Conv2D(2, 1)(Writes()(image))).save(tmp_path / "a.keras")
    with zipfile.ZipFile(tmp_path / "a.keras") as original, zipfile.ZipFile(tmp_path / "b.keras", "w") as changed:
        for name in original.namelist():
            data = original.read(name)
            if name == "config.json":
                config = json.loads(data)
                layer = next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Writes")
                layer["module"] = "keras.layers"
                data = json.dumps(config).encode()
            changed.writestr(name, data)
    monkeypatch.setattr(Writes, "trace", tmp_path / "made")
    assert load_error(tmp_path / "b.keras").startswith(
        "b.keras contains elsewhere>Writes. A base may contain only built-in"
    )
    assert not (tmp_path / "made").exists()


def test_custom_function_is_rejected_and_custom_loss_is_ignored(tmp_path):
    def own(values):
        return values

    image = keras.Input((16, 16, 3))
    maps = keras.layers.Conv2D(2, 1, name="convolution", activation=own)(image)
    keras.Model(image, maps).save(tmp_path / "a.keras")
    assert "a function (own)" in load_error(tmp_path / "a.keras", "convolution")

    def own_loss(true, predicted):
        return keras.ops.mean(predicted)

    model = functional()
    model.compile(optimizer="sgd", loss=own_loss)
    model.save(tmp_path / "b.keras")
    assert load_saved_base(tmp_path / "b.keras", "both", (16, 16)).output_shape == (None, 16, 16, 6)


def test_cut_at_the_input_is_rejected(tmp_path):
    functional().save(tmp_path / "a.keras")
    assert load_error(tmp_path / "a.keras", 0) == (
        "spec.model.base.saved.cutAt is 0, but a.keras up to that layer has no layer with weights. "
        "Choose another layer."
    )


def test_ambiguous_cut_layer_is_rejected_with_all_paths(tmp_path):
    first = sequential_of(keras.layers.Conv2D(3, 1, name="same"), name="first")
    second = sequential_of(keras.layers.Conv2D(3, 1, name="same"), name="second")
    sequential_of(first, second, name="both").save(tmp_path / "a.keras")
    assert load_error(tmp_path / "a.keras", "same") == (
        "spec.model.base.saved.cutAt is same, and a.keras has 2 layers of that name: first/same and second/same. "
        "Use one of these paths."
    )
    assert load_saved_base(tmp_path / "a.keras", "first/same", (16, 16)).count_params() == 12


def test_corrupt_file_is_reported(tmp_path):
    functional().save(tmp_path / "a.keras")
    shutil.copy(tmp_path / "a.keras", tmp_path / "b.keras")
    (tmp_path / "b.keras").write_bytes((tmp_path / "a.keras").read_bytes()[:2000])
    assert load_error(tmp_path / "b.keras").startswith("b.keras is not a Keras model")
