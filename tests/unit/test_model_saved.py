"""Models that somebody saved, cut and used as a base; code in them is never run."""

from pathlib import Path

import keras
import numpy as np
import pytest

from topwork.errors import DataError
from topwork.model.saved import cut

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
def test_a_base_gives_what_the_model_gave_at_that_layer(make, cut_at, same_as, tmp_path):
    keras.utils.clear_session()
    model = make()
    path = tmp_path / ("a.h5" if make is sequential else "a.keras")
    model.save(path)
    content = path.read_bytes()
    base = cut(path, cut_at, (16, 16))
    assert base.name == "base"
    np.testing.assert_allclose(base.predict_on_batch(PIXELS), reference(model, same_as), rtol=1e-5, atol=1e-6)
    assert path.read_bytes() == content


def test_a_model_of_topwork_is_cut_at_its_base_with_the_scaling_kept(tmp_path):
    model = topwork_model()
    model.save(tmp_path / "a.keras")
    base = cut(tmp_path / "a.keras", None, (16, 16))
    scaled = PIXELS[..., ::-1] / np.float32(255)
    expected = model.get_layer("base").predict_on_batch(scaled)
    np.testing.assert_allclose(base.predict_on_batch(PIXELS), expected, rtol=1e-5, atol=1e-6)
    low = cut(tmp_path / "a.keras", "low", (16, 16))
    inner = model.get_layer("base")
    expected = keras.Model(inner.inputs, inner.get_layer("low").output).predict_on_batch(scaled)
    np.testing.assert_allclose(low.predict_on_batch(PIXELS), expected, rtol=1e-5, atol=1e-6)


def test_a_model_for_any_size_takes_any_size(tmp_path):
    image = keras.Input((None, None, 3))
    maps = keras.layers.Conv2D(2, 3, strides=2, name="deep")(image)
    keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalMaxPooling2D()(maps))).save(tmp_path / "a.keras")
    assert cut(tmp_path / "a.keras", "deep", (33, 21)).output_shape == (None, 16, 10, 2)


def test_a_cut_below_the_flat_layers_takes_another_size(tmp_path):
    model = functional()
    model.save(tmp_path / "a.keras")
    base = cut(tmp_path / "a.keras", "both", (8, 12))
    assert base.output_shape == (None, 8, 12, 6)
    expected = reference(model, "both")[:, 1:7, 1:11]
    given = base.predict_on_batch(PIXELS[:, :8, :12])[:, 1:7, 1:11]
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


def refusal(path, cut_at=None, size=(16, 16)):
    with pytest.raises(DataError) as error:
        cut(path, cut_at, size)
    return str(error.value)


def test_refusals_say_what_to_do(tmp_path):
    path = tmp_path / "a.keras"
    functional().save(path)
    assert refusal(path, "classes", (32, 24)) == (
        "a.keras was made for images of 16x16, and can't take spec.dataset.imageSize [32, 24]. Use [16, 16]."
    )
    assert refusal(path, "borth") == (
        "spec.model.base.saved.cutAt is borth, but a.keras has no layer of that name. Did you mean both or norm?"
    )
    assert refusal(path, 50).endswith("but a.keras has 8 layers: an index lies between -8 and 7.")
    (tmp_path / "b.keras").write_bytes(b"no model")
    assert refusal(tmp_path / "b.keras").startswith("b.keras is no Keras model: expected a .keras file, or a legacy")
    functional().save_weights(tmp_path / "c.weights.h5")
    assert "(model.save, not model.save_weights)" in refusal(tmp_path / "c.weights.h5")
    grey = keras.Input((16, 16, 1))
    keras.Model(grey, keras.layers.Conv2D(1, 1)(grey)).save(tmp_path / "d.keras")
    assert refusal(tmp_path / "d.keras").startswith("d.keras takes (None, 16, 16, 1): a base takes one batch of RGB")


@keras.saving.register_keras_serializable("elsewhere")
class Custom(keras.layers.Layer):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_code_in_a_model_is_refused_and_never_run(tmp_path, suffix):
    ran = tmp_path / "ran"
    image = keras.Input((16, 16, 3))
    spy = keras.layers.Lambda(lambda x, path=str(ran): (Path(path).touch(), x)[1], output_shape=(16, 16, 3), name="spy")
    keras.Model(image, keras.layers.Conv2D(2, 1)(spy(image))).save(tmp_path / f"a.{suffix}")
    ran.unlink(missing_ok=True)
    assert "a Lambda (spy)" in refusal(tmp_path / f"a.{suffix}")
    assert not ran.exists()


def test_a_layer_from_outside_keras_is_refused(tmp_path):
    image = keras.Input((16, 16, 3))
    keras.Model(image, keras.layers.Conv2D(2, 1)(Custom()(image))).save(tmp_path / "a.keras")
    assert refusal(tmp_path / "a.keras").startswith("a.keras holds ")
