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
_FIRST_WORDS = {_NAMES[0]: "cell_", _NAMES[4]: "conv_"}


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
    own = [_block_name(layer.name) for layer in model.layers]
    if not any(own):
        spread = [str(layer.name) for layer in model.layers]
    elif any(name.startswith("mixed") for name in own):
        spread = _fill_from_block_ends(model, own)
    else:
        spread = _fill_from_block_starts(own)
    found: list[tuple[Any, str]] = []
    for layer, name, block in zip(model.layers, own, spread, strict=True):
        if not isinstance(layer, keras.Model):
            found.append((layer, block))
        elif not name and any(_block_name(inner.name) for inner in layer.layers):
            found += [(leaf, f"{layer.name}/{inner}") for leaf, inner in _all_layers(layer)]
        else:
            whole = name or re.sub(r"^convnext_[a-z]+_", "", layer.name)
            found += [(leaf, whole) for leaf, _ in _all_layers(layer)]
    return found


def _block_name(layer: str) -> str:
    for pattern in _NAMES:
        if found := pattern.match(layer):
            return _FIRST_WORDS.get(pattern, "") + found.group(1)
    return ""


def _fill_from_block_starts(own: list[str]) -> list[str]:
    """Assign a layer without a block name to the block before it."""
    current = next(filter(None, own))
    spread = []
    for name in own:
        current = name or current
        spread.append(current)
    return spread


def _fill_from_block_ends(model: keras.Model, own: list[str]) -> list[str]:
    """Assign a layer without a block name to the block after it.

    Layers before the last pooling that precedes the first named block form the stem.
    """
    current = next(filter(None, reversed(own)))
    spread = []
    for name in reversed(own):
        current = name or current
        spread.append(current)
    spread.reverse()
    first = next(index for index, name in enumerate(own) if name)
    pools = [index for index in range(first) if isinstance(model.layers[index], keras.layers.MaxPooling2D)]
    stem = pools[-1] if pools else 0
    return ["stem"] * stem + spread[stem:]


def _merge_adjacent(names: list[str]) -> list[str]:
    """Merge adjacent blocks until there are at most MAX_GROUPS."""
    each = list(dict.fromkeys(names))
    if len(each) <= MAX_GROUPS:
        return names
    size = -(-len(each) // MAX_GROUPS)
    merged: dict[str, str] = {}
    for start in range(0, len(each), size):
        part = each[start : start + size]
        merged |= dict.fromkeys(part, part[0] if len(part) == 1 else f"{part[0]}..{part[-1]}")
    return [merged[name] for name in names]
