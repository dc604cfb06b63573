"""Which block each layer of a base belongs to, by the names that Keras and people give their layers."""

import re
from typing import Any

import keras

MOST_BLOCKS = 40

# Beginnings of the layers' names in keras.applications, one line a family; what is in brackets names the block.
_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:separable_conv|normal|reduction|adjust)_.*?_((?:stem_|reduce_)?\d+)$",  # NASNet: the cell at the end
        r"(block\d+)[a-z]?(?=_|$)",  # VGG, Xception, EfficientNet (block4b), Inception-ResNet (block35)
        r"(block_\d+)(?=_|$)",  # MobileNetV2
        r"(?:convnext_[a-z]+_)?(stage_?\d+|stem)(?=_|$)",  # ConvNeXt
        r"conv_[dp]w_(\d+)(?=_|$)",  # MobileNet
        r"(expanded_conv(?:_\d+)?)(?=_)",  # MobileNetV3
        r"(mixed_?\d+[a-z]?)(?=_|$)",  # Inception: stands on the layer that ends the block
        r"((?:Conv|conv|convolution)_?\d+)(?=_|$)",  # ResNet, DenseNet, and the bases made here
        r"(stem|top|post)(?=_|$)",
    )
)
_FIRST_WORDS = {_NAMES[0]: "cell_", _NAMES[4]: "conv_"}


def blocks(model: keras.Model) -> list[tuple[Any, str]]:
    """Name the block of every layer, those of nested models too.

    Args:
        model: A base.

    Returns:
        Layers with weights from input to output, each with the name of its block: `block4`, or `inner/block4` in a
        nested model; a nested model without blocks is one. At most MOST_BLOCKS names: more are taken together.
    """
    named = [(layer, name) for layer, name in _blocks(model) if layer.weights]
    return [(layer, merged) for (layer, _), merged in zip(named, _at_most([name for _, name in named]), strict=True)]


def _blocks(model: keras.Model) -> list[tuple[Any, str]]:
    own = [_named(layer.name) for layer in model.layers]
    if not any(own):
        spread = [str(layer.name) for layer in model.layers]
    elif any(name.startswith("mixed") for name in own):
        spread = _from_their_ends(model, own)
    else:
        spread = _from_their_beginnings(own)
    found: list[tuple[Any, str]] = []
    for layer, name, block in zip(model.layers, own, spread, strict=True):
        if not isinstance(layer, keras.Model):
            found.append((layer, block))
        elif not name and any(_named(inner.name) for inner in layer.layers):
            found += [(leaf, f"{layer.name}/{inner}") for leaf, inner in _blocks(layer)]
        else:
            whole = name or re.sub(r"^convnext_[a-z]+_", "", layer.name)
            found += [(leaf, whole) for leaf, _ in _blocks(layer)]
    return found


def _named(layer: str) -> str:
    for pattern in _NAMES:
        if found := pattern.match(layer):
            return _FIRST_WORDS.get(pattern, "") + found.group(1)
    return ""


def _from_their_beginnings(own: list[str]) -> list[str]:
    """Give a layer without a block that of the layer before it."""
    current = next(filter(None, own))
    spread = []
    for name in own:
        current = name or current
        spread.append(current)
    return spread


def _from_their_ends(model: keras.Model, own: list[str]) -> list[str]:
    """Give a layer without a block that of the layer after it; what comes before the last early pooling is the stem."""
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


def _at_most(names: list[str]) -> list[str]:
    """Take neighbours together where there are too many."""
    each = list(dict.fromkeys(names))
    if len(each) <= MOST_BLOCKS:
        return names
    size = -(-len(each) // MOST_BLOCKS)
    merged: dict[str, str] = {}
    for start in range(0, len(each), size):
        part = each[start : start + size]
        merged |= dict.fromkeys(part, part[0] if len(part) == 1 else f"{part[0]}..{part[-1]}")
    return [merged[name] for name in names]
