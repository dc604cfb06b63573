"""Names of inverted residual blocks in PyTorch libraries: MobileNetV2, MobileNetV3, EfficientNet and EfficientNetV2."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# Layers of a block, as keras.applications names them in different families.
_ROLES = {
    "expand_conv": "expand",
    "expand_BN": "expand_bn",
    "dwconv": "depthwise",
    "dwconv2": "depthwise",
    "bn": "depthwise_bn",
    "depthwise_BN": "depthwise_bn",
    "squeeze_excite_conv": "se_reduce",
    "squeeze_excite_conv_1": "se_expand",
    "project_conv": "project",
    "project_BN": "project_bn",
}
_BLOCK = re.compile(r"(block\d[a-z]|block_\d+|expanded_conv(?:_\d+)?)_(\w+)")
# Names in timm by whether a block has an expansion and a depthwise convolution.
_TIMM = {
    (True, True): "expand conv_pw expand_bn bn1 depthwise conv_dw depthwise_bn bn2 project conv_pwl project_bn bn3",
    (False, True): "depthwise conv_dw depthwise_bn bn1 project conv_pw project_bn bn2",
    (True, False): "expand conv_exp expand_bn bn1 project conv_pwl project_bn bn2",
    (False, False): "project conv project_bn bn1",
}
_MOBILENET_V2_STAGES = (1, 2, 3, 4, 3, 3, 1)
# By number of blocks: MobileNetV3Small and MobileNetV3Large.
_MOBILENET_V3_STAGES = {11: (1, 2, 3, 2, 3), 15: (1, 2, 3, 4, 2, 3)}


@dataclass
class _Block:
    """A block: its Keras layers by role."""

    name: str
    layers: dict[str, str] = field(default_factory=dict)

    def name_layers(self, prefix: str, names: Mapping[str, str]) -> dict[str, str]:
        return {layer: f"{prefix}.{names[role]}" for role, layer in self.layers.items()}


def _find_blocks(layers: Sequence[str]) -> list[_Block]:
    blocks: dict[str, _Block] = {}
    for layer in layers:
        if match := _BLOCK.fullmatch(layer):
            block = blocks.setdefault(match[1], _Block(match[1]))
            block.layers[_ROLES.get(match[2], match[2])] = layer
    return list(blocks.values())


def _timm_names(block: _Block) -> dict[str, str]:
    words = _TIMM["expand" in block.layers, "depthwise" in block.layers].split()
    names = {words[index]: words[index + 1] for index in range(0, len(words), 2)}
    return names | {"se_reduce": "se.conv_reduce", "se_expand": "se.conv_expand"}


def _torchvision_names(block: _Block, *, flat_project: bool = False) -> dict[str, str]:
    """Name the layers by their position among those that the block has."""
    position = 0
    names: dict[str, str] = {}
    for role in ("expand", "depthwise", "se_reduce", "project"):
        if role not in block.layers:
            continue
        if role == "se_reduce":
            names |= {"se_reduce": f"{position}.fc1", "se_expand": f"{position}.fc2"}
        elif role == "project" and flat_project:
            names |= {"project": f"{position}", "project_bn": f"{position + 1}"}
        else:
            names |= {role: f"{position}.0", f"{role}_bn": f"{position}.1"}
        position += 1
    return names


def _stage_positions(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield stage and position in the stage of each block, from 0."""
    return ((stage, position) for stage, size in enumerate(sizes) for position in range(size))


def timm_mobilenet_v2(layers: Sequence[str]) -> dict[str, str]:
    """Names of MobileNetV2 in timm."""
    names = {"Conv1": "conv_stem", "bn_Conv1": "bn1", "Conv_1": "conv_head", "Conv_1_bn": "bn2"}
    return names | _timm_blocks(layers, _MOBILENET_V2_STAGES)


def timm_mobilenet_v3(layers: Sequence[str]) -> dict[str, str]:
    """Names of MobileNetV3 in timm."""
    stages = _MOBILENET_V3_STAGES[len(_find_blocks(layers))]
    last = f"blocks.{len(stages)}.0"
    names = {"conv": "conv_stem", "conv_bn": "bn1", "conv_1": f"{last}.conv", "conv_1_bn": f"{last}.bn1"}
    return names | _timm_blocks(layers, stages)


def _timm_blocks(layers: Sequence[str], stages: Sequence[int]) -> dict[str, str]:
    names: dict[str, str] = {}
    for block, (stage, position) in zip(_find_blocks(layers), _stage_positions(stages), strict=True):
        names |= block.name_layers(f"blocks.{stage}.{position}", _timm_names(block))
    return names


def timm_efficientnet(layers: Sequence[str]) -> dict[str, str]:
    """Names of EfficientNet and EfficientNetV2 in timm."""
    names = {"stem_conv": "conv_stem", "stem_bn": "bn1", "top_conv": "conv_head", "top_bn": "bn2"}
    return names | _timm_blocks(layers, _efficientnet_stages(layers))


def torchvision_mobilenet_v2(layers: Sequence[str]) -> dict[str, str]:
    """Names of MobileNetV2 in torchvision."""
    blocks = _find_blocks(layers)
    last = f"features.{len(blocks) + 1}"
    names = {"Conv1": "features.0.0", "bn_Conv1": "features.0.1", "Conv_1": f"{last}.0", "Conv_1_bn": f"{last}.1"}
    for index, block in enumerate(blocks, start=1):
        names |= block.name_layers(f"features.{index}.conv", _torchvision_names(block, flat_project=True))
    return names


def torchvision_mobilenet_v3(layers: Sequence[str]) -> dict[str, str]:
    """Names of MobileNetV3 in torchvision."""
    blocks = _find_blocks(layers)
    last = f"features.{len(blocks) + 1}"
    names = {"conv": "features.0.0", "conv_bn": "features.0.1", "conv_1": f"{last}.0", "conv_1_bn": f"{last}.1"}
    for index, block in enumerate(blocks, start=1):
        names |= block.name_layers(f"features.{index}.block", _torchvision_names(block))
    return names


def torchvision_efficientnet(layers: Sequence[str]) -> dict[str, str]:
    """Names of EfficientNet and EfficientNetV2 in torchvision."""
    stages = _efficientnet_stages(layers)
    last = f"features.{len(stages) + 1}"
    names = {"stem_conv": "features.0.0", "stem_bn": "features.0.1", "top_conv": f"{last}.0", "top_bn": f"{last}.1"}
    for block, (stage, position) in zip(_find_blocks(layers), _stage_positions(stages), strict=True):
        names |= block.name_layers(f"features.{stage + 1}.{position}.block", _torchvision_names(block))
    return names


def _efficientnet_stages(layers: Sequence[str]) -> list[int]:
    """Count the blocks of each stage: block names contain the stage, as in `block2a`."""
    stages = [block.name[len("block")] for block in _find_blocks(layers)]
    starts = [0, *(index for index, (one, other) in enumerate(pairwise(stages), start=1) if one != other), len(stages)]
    return [end - start for start, end in pairwise(starts)]
