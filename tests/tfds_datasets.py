"""Small datasets that TFDS prepares in a data_dir, with the feature keys of the real datasets.

They are prepared in a separate process: TFDS keeps a registry of builders, and a test must not register one under the
name of a real dataset.
"""

import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FEATURES = {"cats_vs_dogs": "image/filename", "cifar10": "id"}
"""The third feature of real datasets. Other datasets have only an image and a label."""


def prepare_dataset(
    data_dir: Path,
    name: str = "cats_vs_dogs",
    version: str = "4.0.1",
    classes: Sequence[str] = ("cat", "dog"),
    splits: Mapping[str, int] | None = None,
    size: tuple[int, int] = (40, 36),
    *,
    config: str | None = None,
    colors: bool = True,
) -> Path:
    """Prepare a dataset in a directory, like `tfds.load(name, data_dir=data_dir)`.

    Args:
        data_dir: Directory for datasets.
        name: Name of the dataset; TFDS need not provide it.
        version: Its version.
        classes: Names of its classes.
        splits: Number of images of each split, with alternating classes; None for 60 in train.
        size: Height and width of the images in pixels.
        config: Configuration of the dataset; None for none.
        colors: Give each class its own color and texture, so that a small model can distinguish them.

    Returns:
        The directory of the dataset, `<data_dir>/<name>[/<config>]/<version>`.
    """
    settings = {
        "data_dir": str(data_dir),
        "name": name,
        "version": version,
        "classes": list(classes),
        "splits": dict(splits or {"train": 60}),
        "size": list(size),
        "config": config,
        "colors": colors,
    }
    subprocess.run([sys.executable, __file__, json.dumps(settings)], check=True, capture_output=True)
    return data_dir.joinpath(*filter(None, (name, config, version)))


def _main(settings: dict) -> None:
    import tensorflow_datasets as tfds

    def info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=settings["classes"]),
        }
        if third_feature := FEATURES.get(settings["name"]):
            features[third_feature] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def split_generators(self, dl_manager):
        return {split: self._generate_examples(split, count) for split, count in settings["splits"].items()}

    def generate_examples(self, split, count):
        third_feature = FEATURES.get(settings["name"])
        for index in range(count):
            label = index % len(settings["classes"])
            example = {"image": io.BytesIO(_encode_image(settings, split, index, label)), "label": label}
            if third_feature:
                example[third_feature] = f"{split}/{settings['classes'][label]}/{index}.jpg"
            yield index, example

    namespace = {
        "name": settings["name"],
        "VERSION": tfds.core.Version(settings["version"]),
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": generate_examples,
        "__module__": __name__,
    }
    if settings["config"]:
        namespace["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=settings["config"])]
    with tfds.core.registered.skip_registration():
        kind = type("Images", (tfds.core.GeneratorBasedBuilder,), namespace)
    builder = kind(data_dir=settings["data_dir"])
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(compute_stats="skip"))


def _encode_image(settings: dict, split: str, index: int, label: int) -> bytes:
    import zlib

    import numpy as np
    from PIL import Image

    height, width = settings["size"]
    random = np.random.default_rng([zlib.crc32(split.encode()), index])
    pixels = random.integers(0, 100, (height, width, 3)).astype(np.int64)
    if settings["colors"]:
        hue = np.random.default_rng([7, label]).integers(0, 150, 3)
        stripes = 40 * (np.arange(width) // (2 + label % 5) % 2)
        pixels = pixels // 2 + hue + stripes[None, :, None]
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
