"""Writes random state dicts of PyTorch models, and the features that PyTorch computes from them.

    .venv-torch/bin/python tests/conversion/timm_reference.py --fixtures     writes tests/fixtures/conversion.json
    .venv-torch/bin/python tests/conversion/timm_reference.py DIRECTORY      writes files of all models

A model is `LIBRARY/NAME`, followed by the name of a normalization unless it is that of ImageNet. The fixtures contain
no weights: `draw_state` draws them again from names and shapes.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from random_weights import draw_state, make_image
from timm.models import convnext
from timm.models.efficientnet import _gen_efficientnet

FIXTURES = Path(__file__).parents[1] / "fixtures/conversion.json"
# One architecture of each family. Deep ones have fewer blocks in each stage: see `SHALLOW` in test_conversion.py.
FIXTURE_MODELS = {
    "torchvision/vgg16.caffe": None,
    "torchvision/mobilenet_v2": None,
    "timm/mobilenetv3_small_100": None,
    "timm/resnet50": lambda: timm.create_model("resnet50", layers=(2, 1, 1, 1)),
    "timm/densenet121": lambda: timm.create_model("densenet121", block_config=(2, 1, 1, 1)),
    "timm/efficientnet_b0": lambda: _gen_efficientnet("efficientnet_b0", depth_multiplier=0.5),
    "timm/tf_efficientnetv2_b0": lambda: timm.create_model("tf_efficientnetv2_b0", depth_multiplier=0.5),
    "timm/convnext_tiny": lambda: timm.create_model("convnext_tiny", depths=(1, 1, 2, 1)),
}
# Every architecture, and models that differ only in how they compute from equal tensors.
MODELS = (
    *(f"torchvision/mobilenet_{name}" for name in ("v2", "v3_small", "v3_large")),
    *(f"timm/{name}" for name in ("mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100.none")),
    *(f"timm/tf_mobilenetv3_{size}_100.half" for size in ("small", "large")),
    *(
        f"timm/{name}"
        for name in ("efficientnet_b0", "tf_efficientnet_b0.half", "efficientnet_b2", "tf_efficientnet_b3")
    ),
    *(f"torchvision/efficientnet_b{size}" for size in (0, 1, 4)),
    *(f"timm/tf_efficientnetv2_b{size}" for size in range(4)),
    *("torchvision/densenet121", "torchvision/densenet169", "timm/densenet201"),
    *("torchvision/resnet50", "timm/resnet101", "torchvision/resnet152"),
    *("torchvision/vgg16.caffe", "timm/vgg16", "torchvision/vgg19"),
    *(f"{library}/convnext_tiny" for library in ("torchvision", "timm", "facebookresearch")),
    *("torchvision/efficientnet_v2_s", "timm/efficientnetv2_s", "timm/tf_efficientnetv2_s.half"),
    *("torchvision/efficientnet_b5", "timm/tf_efficientnet_b5", "timm/efficientnet_b6", "torchvision/efficientnet_b7"),
    *("torchvision/convnext_small", "timm/convnext_base.clip", "timm/convnext_large", "timm/convnext_xlarge"),
)
# Larger tensors, all in the head of VGG, are left out of the fixtures.
MAX_FIXTURE_VALUES = 10_000_000
FIXTURE_SIZE = (70, 96)
# Maps with an odd and an even number of rows and columns occur in every model.
SIZE = (75, 96)
# `mean` and `std` in timm/data/constants.py, and of VGG16_Weights.IMAGENET1K_FEATURES in torchvision.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "caffe": ((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)),
}


def build(model: str) -> torch.nn.Module:
    """Build a model."""
    library, _, name = model.partition(".")[0].partition("/")
    return torchvision.models.get_model(name) if library == "torchvision" else timm.create_model(name)


def load_random_weights(built: torch.nn.Module, library: str) -> dict[str, list[int]]:
    """Load random weights into a model, and return the shape of each tensor by its name in a library."""
    is_original = library == "facebookresearch"
    shapes = {
        rename_to_original(key) if is_original else key: list(values.shape)
        for key, values in built.state_dict().items()
    }
    state = {key: torch.from_numpy(values) for key, values in draw_state(shapes).items()}
    built.load_state_dict(convnext.checkpoint_filter_fn(state, built) if is_original else state)
    built.eval()
    return shapes


def rename_to_original(key: str) -> str:
    """Return the name of a tensor of ConvNeXt in the original code. timm can read such state dicts."""
    key = re.sub(
        r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", key.replace("stem.", "downsample_layers.0.")
    )
    key = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
    return key.replace("head.norm.", "norm.").replace("head.fc.", "head.")


def compute_features(model: torch.nn.Module, image: np.ndarray, normalization: str) -> np.ndarray:
    """Compute the features that the classifier of a model sees, for one image."""
    mean, deviation = (torch.tensor(values) for values in NORMALIZATIONS[normalization])
    pixels = ((torch.from_numpy(image).float() / 255 - mean) / deviation).permute(2, 0, 1)[None]
    with torch.no_grad():
        return _pool(model, pixels).flatten().numpy()


def _pool(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Compute the average of the last feature maps. ConvNeXt normalizes this average."""
    if hasattr(model, "forward_features"):
        maps = model.forward_features(pixels)
    elif isinstance(model, torchvision.models.ResNet):
        stages = (model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2, model.layer3)
        maps = model.layer4(torch.nn.Sequential(*stages)(pixels))
    else:
        maps = model.features(pixels)
        maps = torch.relu(maps) if isinstance(model, torchvision.models.DenseNet) else maps
    average = maps.mean(dim=(2, 3), keepdim=True)
    if isinstance(model, torchvision.models.ConvNeXt):
        return model.classifier[0](average)
    return model.head.norm(average) if isinstance(model, timm.models.convnext.ConvNeXt) else average


def describe(model: str, built: torch.nn.Module, size: tuple[int, int]) -> dict[str, object]:
    """Return shapes of the tensors of a model, and its features for an image."""
    shapes = load_random_weights(built, model.partition("/")[0])
    normalization = model.partition(".")[2] or "imagenet"
    features = compute_features(built, make_image(*size), normalization).tolist()
    return {"shapes": shapes, "size": size, "features": features}


def write_fixtures() -> None:
    """Write shapes and every eighth feature of the fixture models."""
    content = {}
    for model, build_shallow in FIXTURE_MODELS.items():
        description = describe(model, build_shallow() if build_shallow else build(model), FIXTURE_SIZE)
        shapes = {
            key: "x".join(map(str, shape))
            for key, shape in description["shapes"].items()
            if math.prod(shape) < MAX_FIXTURE_VALUES
        }
        features = [float(f"{value:.7g}") for value in description["features"][::8]]
        content[model] = {"features": features, "shapes": shapes}
    entries = [f"{json.dumps(model)}: {json.dumps(fixture)}" for model, fixture in content.items()]
    FIXTURES.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def read_tags(name: str) -> dict[str, str]:
    """Return the tags of the pretrained weights of a timm model, by the name of their normalization."""
    names = {values: key for key, values in NORMALIZATIONS.items()}
    tags: dict[str, list[str]] = {}
    for model in timm.list_pretrained():
        architecture, _, tag = model.partition(".")
        if architecture == name:
            config = timm.get_pretrained_cfg(model)
            tags.setdefault(names.get((tuple(config.mean), tuple(config.std)), "other"), []).append(tag)
    return {key: " ".join(values) for key, values in tags.items()}


def write_all(directory: Path) -> None:
    """Write shapes and all features of all models, and the tags of all models of timm."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tags.json").write_text(json.dumps({name: read_tags(name) for name in timm.list_models()}))
    for model in MODELS:
        path = directory / f"{model.replace('/', '+')}.json"
        path.write_text(json.dumps({"model": model, **describe(model, build(model), SIZE)}))
        print(model, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--fixtures":
        write_fixtures()
    else:
        write_all(Path(sys.argv[1]))
