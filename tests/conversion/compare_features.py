"""Compares the features of converted models with those that `timm_reference.py` wrote. Run by `make test-conversion`.

.venv/bin/python tests/conversion/compare_features.py DIRECTORY
"""

import json
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
from random_weights import draw_state, make_image
from safetensors.numpy import save_file

from topwork.model.backbones import find_backbone, scale_inputs
from topwork.model.conversion.source_models import SOURCE_MODELS
from topwork.model.conversion.timm_models import TIMM_MODELS
from topwork.model.conversion.weights_file import load_weights_file

# Relative to the largest feature. Rounding differs by up to 1e-5 in the deepest models.
TOLERANCE = 5e-5


def compare(reference: dict, file: Path) -> float:
    """Return the largest relative difference of the features of a model.

    The weights are saved, and loaded for another image size, as in a job.
    """
    source_model, _, normalization = reference["model"].partition(".")
    library, _, name = source_model.partition("/")
    application = next(model.application for model in SOURCE_MODELS if (model.library, model.name) == (library, name))
    save_file(draw_state(reference["shapes"]), file)
    converted = load_weights_file(application, (64, 64), file, source_model, normalization or "imagenet")
    path = file.with_name("converted.weights.h5")
    converted.save(path)
    expected = np.array(reference["features"], np.float32)
    features = compute_features(application, path, tuple(reference["size"]))
    keras.utils.clear_session()
    return float(np.abs(features - expected).max() / np.abs(expected).max())


def compute_features(application: str, path: Path, size: tuple[int, int]) -> np.ndarray:
    """Compute the pooled features of an image of a size, with weights from a file."""
    backbone = find_backbone(application)
    pixels = keras.Input((*size, 3))
    maps = backbone.build(size, path)(scale_inputs(pixels, backbone.find_scaling(path)))
    model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(maps))
    return np.asarray(model(make_image(*size)[None].astype(np.float32)))[0]


def compare_tags(tags: dict[str, dict[str, str]]) -> list[str]:
    """Return the models of timm whose pretrained weights have other normalizations than `TIMM_MODELS` says."""
    return [name for name, (_, known) in TIMM_MODELS.items() if dict(known) != tags[name]]


def main() -> None:
    """Compare all models in the directory given on the command line."""
    directory = Path(sys.argv[1])
    failed = compare_tags(json.loads((directory / "tags.json").read_text()))
    for path in sorted(set(directory.glob("*.json")) - {directory / "tags.json"}):
        reference = json.loads(path.read_text())
        with tempfile.TemporaryDirectory() as scratch:
            difference = compare(reference, Path(scratch) / "model.safetensors")
        print(f"{reference['model']:45} {difference:.1e}", flush=True)
        if not difference < TOLERANCE:
            failed.append(reference["model"])
    if failed:
        sys.exit(f"Different from PyTorch: {', '.join(failed)}")


if __name__ == "__main__":
    main()
