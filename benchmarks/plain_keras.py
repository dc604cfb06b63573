"""Baseline: the transfer learning guide of Keras as a plain script.

Prints one JSON line: for each phase, the duration of `fit` and of the training steps of each epoch in seconds, and the
test accuracy. `--no-autotune` disables autotuning in tf.data, which affects the results considerably.
"""

import argparse
import json
import time
from pathlib import Path

import keras
import tensorflow as tf

RATES = {"transfer": 1e-3, "fine-tune": 1e-5, "all": 1e-3}


class EpochSeconds(keras.callbacks.Callback):
    """Wall time of the training steps of each epoch, without validation."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._started = time.monotonic()

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        self.seconds.append(time.monotonic() - self._started)


def create_datasets(directory: Path, side: int, batch: int, autotune: bool) -> list[tf.data.Dataset]:
    """Create training, validation and test batches as in the guide: read, resize, cache, batch, prefetch."""
    options = tf.data.Options()
    options.autotune.enabled = autotune
    splits = []
    for name in ("train", "validation", "test"):
        images = keras.utils.image_dataset_from_directory(
            directory / name, image_size=(side, side), batch_size=None, shuffle=False, verbose=False
        ).cache()
        if name == "train":
            images = images.shuffle(1000)
        splits.append(images.batch(batch).prefetch(tf.data.AUTOTUNE if autotune else 2).with_options(options))
    return splits


def create_model(base: keras.Model, side: int, flip: bool, rotation: float) -> keras.Model:
    """Create the model of the guide: augmentation, scaling, base without top, average pooling, dropout, one logit."""
    image = keras.Input((side, side, 3))
    x = keras.layers.RandomFlip("horizontal")(image) if flip else image
    x = keras.layers.RandomRotation(rotation)(x) if rotation else x
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(x)
    x = base(x, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.2)(x)
    return keras.Model(image, keras.layers.Dense(1)(x))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path, help="contains train, validation and test with one directory per class")
    parser.add_argument("--base", default="MobileNetV2")
    parser.add_argument("--weights", type=Path, help="weights of the base [default: random]")
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--phases", nargs="+", choices=RATES, default=["transfer", "fine-tune"])
    parser.add_argument("--no-flip", action="store_true")
    parser.add_argument("--rotation", type=float, default=0.0)
    parser.add_argument("--no-autotune", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train all phases and print their durations."""
    options = parse_arguments()
    keras.utils.set_random_seed(1)
    training, validation, test = create_datasets(
        options.directory, options.side, options.batch, not options.no_autotune
    )
    shape = (options.side, options.side, 3)
    base = getattr(keras.applications, options.base)(include_top=False, weights=None, input_shape=shape)
    if options.weights:
        base.load_weights(options.weights)
    model = create_model(base, options.side, not options.no_flip, options.rotation)
    seconds, epochs = {}, {}
    for phase in options.phases:
        base.trainable = phase != "transfer"
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        metrics = [keras.metrics.BinaryAccuracy(threshold=0.0, name="accuracy")]
        model.compile(keras.optimizers.Adam(RATES[phase]), loss, metrics=metrics)
        timer, start = EpochSeconds(), time.monotonic()
        model.fit(training, validation_data=validation, epochs=options.epochs, callbacks=[timer], verbose=0)
        seconds[phase], epochs[phase] = time.monotonic() - start, timer.seconds
    accuracy = model.evaluate(test, verbose=0, return_dict=True)["accuracy"]
    print(json.dumps({"seconds": seconds, "epochs": epochs, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
