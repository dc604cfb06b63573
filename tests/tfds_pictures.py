"""Small datasets as TFDS itself leaves them in its data_dir, with the feature keys of the real ones.

Made in a process of its own: TFDS keeps a register of builders, and one that a test made must not stand in it under
the name of a real dataset.
"""

import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FEATURES = {"cats_vs_dogs": "image/filename", "cifar10": "id"}
"""The third feature of the real datasets; others have an image and a label alone."""


def prepare(
    folder: Path,
    name: str = "cats_vs_dogs",
    version: str = "4.0.1",
    classes: Sequence[str] = ("cat", "dog"),
    splits: Mapping[str, int] | None = None,
    size: tuple[int, int] = (40, 36),
    *,
    config: str | None = None,
    colours: bool = True,
) -> Path:
    """Prepare a dataset in a folder, as `tfds.load(name, data_dir=folder)` would leave it.

    Args:
        folder: The data_dir.
        name: Name of the dataset, registered in TFDS or not.
        version: Its version.
        classes: Names of its classes.
        splits: Images of each split; the classes take turns. Without it, 60 in train.
        size: Height and width of the images in pixels.
        config: Configuration of the dataset, if it has any.
        colours: Give each class a colour and a grain of its own, so that a small model can tell them apart.

    Returns:
        The dataset's own folder, `<folder>/<name>[/<config>]/<version>`.
    """
    asked = {
        "folder": str(folder),
        "name": name,
        "version": version,
        "classes": list(classes),
        "splits": dict(splits or {"train": 60}),
        "size": list(size),
        "config": config,
        "colours": colours,
    }
    subprocess.run([sys.executable, __file__, json.dumps(asked)], check=True, capture_output=True)
    return folder.joinpath(*filter(None, (name, config, version)))


def _main(asked: dict) -> None:
    import tensorflow_datasets as tfds

    def info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=asked["classes"]),
        }
        if third := FEATURES.get(asked["name"]):
            features[third] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def split_generators(self, dl_manager):
        return {split: self._generate_examples(split, count) for split, count in asked["splits"].items()}

    def generate_examples(self, split, count):
        third = FEATURES.get(asked["name"])
        for index in range(count):
            label = index % len(asked["classes"])
            example = {"image": io.BytesIO(_picture(asked, split, index, label)), "label": label}
            if third:
                example[third] = f"{split}/{asked['classes'][label]}/{index}.jpg"
            yield index, example

    namespace = {
        "name": asked["name"],
        "VERSION": tfds.core.Version(asked["version"]),
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": generate_examples,
        "__module__": __name__,
    }
    if asked["config"]:
        namespace["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=asked["config"])]
    with tfds.core.registered.skip_registration():
        kind = type("Pictures", (tfds.core.GeneratorBasedBuilder,), namespace)
    builder = kind(data_dir=asked["folder"])
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(compute_stats="skip"))


def _picture(asked: dict, split: str, index: int, label: int) -> bytes:
    import zlib

    import numpy as np
    from PIL import Image

    height, width = asked["size"]
    random = np.random.default_rng([zlib.crc32(split.encode()), index])
    pixels = random.integers(0, 100, (height, width, 3)).astype(np.int64)
    if asked["colours"]:
        hue = np.random.default_rng([7, label]).integers(0, 150, 3)
        stripes = 40 * (np.arange(width) // (2 + label % 5) % 2)
        pixels = pixels // 2 + hue + stripes[None, :, None]
    picture = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(picture, "JPEG", quality=95)
    return picture.getvalue()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
