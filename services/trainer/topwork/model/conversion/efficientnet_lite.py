"""Names of EfficientNet-Lite0 in PyTorch: the state dict of the efficientnet-lite-pytorch package."""

from topwork.model.efficientnet_lite import blocks


def layer_names() -> dict[str, str]:
    """Return the prefix in the state dict for each layer with weights, from input to output.

    The file has no variants: the package converted it from TensorFlow, and pads and normalizes as TensorFlow does.

    Example:
        >>> layer_names()["block2a_dwconv"]
        '_blocks.1._depthwise_conv'
    """
    names = {"stem_conv": "_conv_stem", "stem_bn": "_bn0"}
    for index, block in enumerate(blocks()):
        layers = {
            "expand_conv": "_expand_conv",
            "expand_bn": "_bn0",
            "dwconv": "_depthwise_conv",
            "bn": "_bn1",
            "project_conv": "_project_conv",
            "project_bn": "_bn2",
        }
        names |= {
            f"{block.name}_{layer}": f"_blocks.{index}.{prefix}"
            for layer, prefix in layers.items()
            if block.expansion > 1 or not layer.startswith("expand")
        }
    return names | {"top_conv": "_conv_head", "top_bn": "_bn1", "predictions": "_fc"}
