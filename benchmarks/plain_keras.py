"""What a user would write instead: the transfer-learning guide of Keras as a plain script, on a folder of images.

Prints one JSON line: the seconds of each epoch, by phase. tf.data's autotuner can be turned off, since it changes much.
"""

import argparse
import json
import time
from pathlib import Path

import keras
import tensorflow as tf


class EpochSeconds(keras.callbacks.Callback):
    """Wall time of the training steps of each epoch, without validation."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._started = time.monotonic()

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        self.seconds.append(time.monotonic() - self._started)


def datasets(folder: Path, side: int, batch: int, autotune: bool) -> list[tf.data.Dataset]:
    """Training and validation batches as the guide makes them: read, resize, cache, batch, prefetch."""
    made = keras.utils.image_dataset_from_directory(
        folder, image_size=(side, side), batch_size=None, validation_split=0.2, subset="both", seed=42, verbose=False
    )
    options = tf.data.Options()
    options.autotune.enabled = autotune
    training, validation = (split.cache() for split in made)
    training = training.shuffle(1000).batch(batch).prefetch(tf.data.AUTOTUNE if autotune else 2)
    return [training.with_options(options), validation.batch(batch).with_options(options)]


def classifier(base_name: str, side: int) -> tuple[keras.Model, keras.Model]:
    """The model of the guide: flip, scale, a base without its top, average pooling, dropout, one logit."""
    base = getattr(keras.applications, base_name)(include_top=False, weights=None, input_shape=(side, side, 3))
    image = keras.Input((side, side, 3))
    x = keras.layers.RandomFlip("horizontal")(image)
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(x)
    x = base(x, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.2)(x)
    return keras.Model(image, keras.layers.Dense(1)(x)), base


def main() -> None:
    """Train the head, then everything, and print the seconds of each epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", default="MobileNetV2")
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--no-autotune", action="store_true")
    options = parser.parse_args()
    training, validation = datasets(options.folder, options.side, options.batch, not options.no_autotune)
    model, base = classifier(options.base, options.side)
    phases = {}
    for phase, trainable, learning_rate in (("transfer", False, 1e-3), ("fine-tune", True, 1e-5)):
        base.trainable = trainable
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
        clock = EpochSeconds()
        model.fit(training, validation_data=validation, epochs=options.epochs, callbacks=[clock], verbose=0)
        phases[phase] = clock.seconds
    print(json.dumps(phases))


if __name__ == "__main__":
    main()
