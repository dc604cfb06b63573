"""Groups the layers of a base into blocks, by the naming conventions of keras.applications."""

import re
from typing import Any

import keras

MAX_GROUPS = 40

# Prefixes of layer names in keras.applications, one line per family. The capture group is the block name.
_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:separable_conv|normal|reduction|adjust)_.*?_((?:stem_|reduce_)?\d+)$",  # NASNet: cell number last
        r"(block\d+)[a-z]?(?=_|$)",  # VGG, Xception, EfficientNet (block4b), Inception-ResNet (block35)
        r"(block_\d+)(?=_|$)",  # MobileNetV2
        r"(?:convnext_[a-z]+_)?(stage_?\d+|stem)(?=_|$)",  # ConvNeXt
        r"conv_[dp]w_(\d+)(?=_|$)",  # MobileNet
        r"(expanded_conv(?:_\d+)?)(?=_)",  # MobileNetV3
        r"(mixed_?\d+[a-z]?)(?=_|$)",  # Inception: the name of the layer that ends the block
        r"((?:Conv|conv|convolution)_?\d+)(?=_|$)",  # ResNet, DenseNet, and the CNN base of topwork
        r"(stem|top|post)(?=_|$)",
    )
)
_BLOCK_PREFIXES = {_NAMES[0]: "cell_", _NAMES[4]: "conv_"}


def name_layer_groups(model: keras.Model) -> list[tuple[Any, str]]:
    """Assign every layer of a base, including nested models, to a block.

    Args:
        model: A base.

    Returns:
        Layers with weights, from input to output, each with the name of its block: `block4`, or `inner/block4` in a
        nested model. A nested model without blocks is one block. Adjacent blocks are merged if there are more than
        MAX_GROUPS.
    """
    named = [(layer, name) for layer, name in _all_layers(model) if layer.weights]
    return [
        (layer, merged) for (layer, _), merged in zip(named, _merge_adjacent([name for _, name in named]), strict=True)
    ]


def _all_layers(model: keras.Model) -> list[tuple[Any, str]]:
    block_names = [_block_name(layer.name) for layer in model.layers]
    if not any(block_names):
        filled = [str(layer.name) for layer in model.layers]
    elif any(name.startswith("mixed") for name in block_names):
        filled = _fill_from_block_ends(model, block_names)
    else:
        filled = _fill_from_block_starts(block_names)
    result: list[tuple[Any, str]] = []
    for layer, name, block in zip(model.layers, block_names, filled, strict=True):
        if not isinstance(layer, keras.Model):
            result.append((layer, block))
        elif not name and any(_block_name(inner.name) for inner in layer.layers):
            result += [(leaf, f"{layer.name}/{inner}") for leaf, inner in _all_layers(layer)]
        else:
            block_of_model = name or re.sub(r"^convnext_[a-z]+_", "", layer.name)
            result += [(leaf, block_of_model) for leaf, _ in _all_layers(layer)]
    return result


def _block_name(layer: str) -> str:
    for pattern in _NAMES:
        if match := pattern.match(layer):
            return _BLOCK_PREFIXES.get(pattern, "") + match.group(1)
    return ""


def _fill_from_block_starts(block_names: list[str]) -> list[str]:
    """Assign a layer without a block name to the block before it."""
    current = next(filter(None, block_names))
    filled = []
    for name in block_names:
        current = name or current
        filled.append(current)
    return filled


def _fill_from_block_ends(model: keras.Model, block_names: list[str]) -> list[str]:
    """Assign a layer without a block name to the block after it.

    Layers before the last pooling that precedes the first named block form the stem.
    """
    current = next(filter(None, reversed(block_names)))
    filled = []
    for name in reversed(block_names):
        current = name or current
        filled.append(current)
    filled.reverse()
    first = next(index for index, name in enumerate(block_names) if name)
    pools = [index for index in range(first) if isinstance(model.layers[index], keras.layers.MaxPooling2D)]
    stem = pools[-1] if pools else 0
    return ["stem"] * stem + filled[stem:]


def _merge_adjacent(names: list[str]) -> list[str]:
    """Merge adjacent blocks until there are at most MAX_GROUPS."""
    unique_names = list(dict.fromkeys(names))
    if len(unique_names) <= MAX_GROUPS:
        return names
    size = -(-len(unique_names) // MAX_GROUPS)
    merged: dict[str, str] = {}
    for start in range(0, len(unique_names), size):
        part = unique_names[start : start + size]
        merged |= dict.fromkeys(part, part[0] if len(part) == 1 else f"{part[0]}..{part[-1]}")
    return [merged[name] for name in names]
