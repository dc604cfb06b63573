"""Names of the layers of keras.applications in the state dicts of PyTorch libraries."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from topwork.model.conversion import efficientnet_lite, mobile_blocks
from topwork.model.conversion.graph import FINAL_NORM
from topwork.model.conversion.layers import UNUSED

NamesFunction = Callable[[Sequence[str]], dict[str, str]]


@dataclass(frozen=True)
class Style:
    """Names that a library gives to the layers of a family of models.

    Attributes:
        applications: Regular expression of the names in `APPLICATIONS`.
        libraries: Libraries with these names.
        marker: Name of a tensor that only this style has among those of the same application.
        names: Returns the prefix in the state dict of each Keras layer.
        head: Regular expression of the tensors of the classification head, which are not needed.
        absent_biases_are_zero: Whether convolutions have no bias where those of Keras have one.
    """

    applications: str
    libraries: tuple[str, ...]
    marker: str
    names: NamesFunction
    head: str
    absent_biases_are_zero: bool = False

    def count_values(self, state: Mapping[str, np.ndarray]) -> int:
        """Count the values of a state dict without those of the head."""
        ignored = re.compile(f"{self.head}|{UNUSED}")
        return sum(values.size for name, values in state.items() if not ignored.search(name))


def find_styles(application: str) -> list[Style]:
    """Return the styles of the state dicts that can be converted to an application."""
    return [style for style in STYLES if re.fullmatch(style.applications, application)]


def rename_old_names(state: Mapping[str, object]) -> dict[str, str]:
    """Map each name of a state dict to its current name: torchvision once named `norm.1` what is now `norm1`."""
    return {name: re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name) for name in state}


def _resnet(layers: Iterable[str]) -> dict[str, str]:
    names = {"conv1_conv": "conv1", "conv1_bn": "bn1"}
    for layer in layers:
        if match := re.fullmatch(r"conv(\d)_block(\d+)_([0-3])_(conv|bn)", layer):
            stage, block, index, kind = int(match[1]), int(match[2]), match[3], match[4]
            shortcut = {"conv": "downsample.0", "bn": "downsample.1"}[kind]
            names[layer] = f"layer{stage - 1}.{block - 1}." + (shortcut if index == "0" else f"{kind}{index}")
    return names


def _vgg(layers: Iterable[str]) -> dict[str, str]:
    names, index, previous = {}, 0, "1"
    for layer in layers:
        if match := re.fullmatch(r"block(\d)_conv\d", layer):
            index += match[1] != previous  # a pooling layer
            names[layer], previous = f"features.{index}", match[1]
            index += 2  # a convolution and its activation
    return names


def _densenet(layers: Iterable[str]) -> dict[str, str]:
    names = {"conv1_conv": "features.conv0", "conv1_bn": "features.norm0", "bn": "features.norm5"}
    parts = {"0_bn": "norm1", "1_conv": "conv1", "1_bn": "norm2", "2_conv": "conv2"}
    for layer in layers:
        if match := re.fullmatch(r"conv(\d)_block(\d+)_(\d_\w+)", layer):
            names[layer] = f"features.denseblock{int(match[1]) - 1}.denselayer{match[2]}.{parts[match[3]]}"
        elif match := re.fullmatch(r"pool(\d)_(bn|conv)", layer):
            names[layer] = f"features.transition{int(match[1]) - 1}.{'norm' if match[2] == 'bn' else 'conv'}"
    return names


@dataclass(frozen=True)
class _ConvNeXtNames:
    """Names of ConvNeXt: `{i}` is the stage and `{j}` the block, from 0."""

    stem_conv: str
    stem_norm: str
    downsampling_norm: str
    downsampling_conv: str
    block: str
    parts: Mapping[str, str]
    final_norm: str
    stage_factor: int = 1  # torchvision counts downsampling layers and stages in one list
    stage_offset: int = 0

    def __call__(self, layers: Sequence[str]) -> dict[str, str]:
        names = {FINAL_NORM: self.final_norm}
        for layer in layers:
            if match := re.fullmatch(r"\w+_stage_(\d)_block_(\d+)_(\w+)", layer):
                stage = int(match[1]) * self.stage_factor + self.stage_offset
                names[layer] = self.block.format(i=stage, j=match[2]) + self.parts[match[3]]
            elif match := re.fullmatch(r"\w+_downsampling_(conv|layernorm)_(\d)", layer):
                pattern = self.downsampling_conv if match[1] == "conv" else self.downsampling_norm
                names[layer] = pattern.format(i=(int(match[2]) + 1) * self.stage_factor)
            elif match := re.fullmatch(r"\w+_stem_(conv|layernorm)", layer):
                names[layer] = self.stem_conv if match[1] == "conv" else self.stem_norm
        return names


def _parts(depthwise: str, norm: str, first: str, second: str, scale: str) -> dict[str, str]:
    return {
        "depthwise_conv": depthwise,
        "layernorm": norm,
        "pointwise_conv_1": first,
        "pointwise_conv_2": second,
        "layer_scale": scale,
    }


_TIMM_CONVNEXT = _ConvNeXtNames(
    "stem.0",
    "stem.1",
    "stages.{i}.downsample.0",
    "stages.{i}.downsample.1",
    "stages.{i}.blocks.{j}.",
    _parts("conv_dw", "norm", "mlp.fc1", "mlp.fc2", "gamma"),
    "head.norm",
)
_TORCHVISION_CONVNEXT = _ConvNeXtNames(
    "features.0.0",
    "features.0.1",
    "features.{i}.0",
    "features.{i}.1",
    "features.{i}.{j}.",
    _parts("block.0", "block.2", "block.3", "block.5", "layer_scale"),
    "classifier.0",
    stage_factor=2,
    stage_offset=1,
)
_ORIGINAL_CONVNEXT = _ConvNeXtNames(
    "downsample_layers.0.0",
    "downsample_layers.0.1",
    "downsample_layers.{i}.0",
    "downsample_layers.{i}.1",
    "stages.{i}.{j}.",
    _parts("dwconv", "norm", "pwconv1", "pwconv2", "gamma"),
    "norm",
)

STYLES = (
    Style("ResNet(50|101|152)", ("torchvision", "timm"), "layer1.0.conv1.weight", _resnet, r"^fc\.", True),
    Style("VGG1[69]", ("torchvision", "timm"), "features.0.weight", _vgg, r"^(classifier|pre_logits|head)\."),
    Style("DenseNet(121|169|201)", ("torchvision", "timm"), "features.conv0.weight", _densenet, r"^classifier\."),
    Style(
        "MobileNetV2", ("torchvision",), "features.0.0.weight", mobile_blocks.torchvision_mobilenet_v2, r"^classifier\."
    ),
    Style("MobileNetV2", ("timm",), "conv_stem.weight", mobile_blocks.timm_mobilenet_v2, r"^classifier\."),
    Style(
        "MobileNetV3(Small|Large)",
        ("torchvision",),
        "features.0.0.weight",
        mobile_blocks.torchvision_mobilenet_v3,
        r"^classifier\.",
    ),
    # timm applies conv_head after pooling, as the first layer of the head.
    Style(
        "MobileNetV3(Small|Large)",
        ("timm",),
        "conv_stem.weight",
        mobile_blocks.timm_mobilenet_v3,
        r"^(conv_head|norm_head|classifier)\.",
    ),
    Style(
        "EfficientNet(B|V2B|V2S).*",
        ("torchvision",),
        "features.0.0.weight",
        mobile_blocks.torchvision_efficientnet,
        r"^classifier\.",
    ),
    Style(
        "EfficientNet(B|V2B|V2S).*", ("timm",), "conv_stem.weight", mobile_blocks.timm_efficientnet, r"^classifier\."
    ),
    Style("ConvNeXt.+", ("torchvision",), "features.0.0.weight", _TORCHVISION_CONVNEXT, r"^classifier\.[12]\."),
    Style("ConvNeXt.+", ("timm",), "stem.0.weight", _TIMM_CONVNEXT, r"^head\.fc\."),
    Style(
        "ConvNeXt.+", ("facebookresearch",), "downsample_layers.0.0.weight", _ORIGINAL_CONVNEXT, r"^head\.(weight|bias)"
    ),
    Style(
        "EfficientNetLite0",
        ("efficientnet-lite-pytorch",),
        "_conv_stem.weight",
        lambda _: efficientnet_lite.layer_names(),
        r"^_fc\.",
    ),
)
