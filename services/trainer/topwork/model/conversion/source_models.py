"""Models of PyTorch libraries whose weights can be converted, and how each of them computes.

A state dict contains only names and values: not the padding, the epsilon of BatchNorm, or the input normalization.
These differ between models whose tensors have equal names and shapes.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from topwork.errors import SettingError
from topwork.model.conversion.timm_models import TIMM_MODELS
from topwork.model.conversion.variant import IMAGENET, Normalization, Variant

NORMALIZATIONS = {
    "imagenet": IMAGENET,
    "half": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "clip": Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    # VGG16_Weights.IMAGENET1K_FEATURES of torchvision, converted from Caffe.
    "caffe": Normalization((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)),
}
"""Input normalizations by name."""

# Models whose tensors have the same names and shapes, but which compute differently and cannot be converted.
_SIMILAR = {
    "ResNet50": "timm/resnetaa50, timm/resnetblur50, and resnet50_caffe of MMDetection",
    "ResNet101": "resnet101_caffe of MMDetection",
    "EfficientNetB0": "timm/efficientnet_blur_b0",
}
_TORCH_EPSILON, _TENSORFLOW_EPSILON = 1e-5, 1e-3
LITE_LIBRARY = "efficientnet-lite-pytorch"


@dataclass(frozen=True)
class SourceModel:
    """A model of a PyTorch library.

    Attributes:
        library: torchvision, timm, facebookresearch or efficientnet-lite-pytorch.
        name: Its name in the library.
        application: The model of `APPLICATIONS` with the same layers.
        tags: Pretrained weights with each normalization, by the name of the normalization.
    """

    library: str
    name: str
    application: str
    tags: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"

    def variant(self, normalization: str) -> Variant | None:
        """Return how it computes.

        Args:
            normalization: Name of its input normalization.

        Returns:
            The variant; None if it computes exactly as the model of `APPLICATIONS`.
        """
        if self.library == LITE_LIBRARY:
            return None
        same = self.name.startswith("tf_")
        strided = re.match("MobileNet|EfficientNet", self.application)
        return Variant(
            application=self.application,
            source=str(self),
            padding="symmetric" if strided and not same else "same",
            stride_in_3x3=self.application.startswith("ResNet"),
            batch_norm_epsilon=self._epsilon(),
            normalization=NORMALIZATIONS[normalization],
            norm_after_pooling=self.application.startswith("ConvNeXt"),
        )

    def _epsilon(self) -> float | None:
        if re.match("VGG|ConvNeXt", self.application):
            return None  # has no BatchNorm
        if self.name.startswith("tf_"):
            return _TENSORFLOW_EPSILON
        tensorflow = r"mobilenet_v3_\w+|efficientnet_b[567]|efficientnet_v2_\w+"
        if self.library == "torchvision" and re.fullmatch(tensorflow, self.name):
            return _TENSORFLOW_EPSILON
        return _TORCH_EPSILON


def find_source_models(application: str, libraries: Collection[str] | None = None) -> list[SourceModel]:
    """Return the models that can be converted to an application, of some libraries or of all."""
    models = [model for model in SOURCE_MODELS if model.application == application]
    return [model for model in models if libraries is None or model.library in libraries]


@dataclass(frozen=True)
class _Choice:
    """A source model with the pretrained weights and the normalization that it may have."""

    model: SourceModel
    normalization: str
    tag: str = ""

    def computation(self) -> Variant | None:
        """Return how it computes, regardless of its name."""
        variant = self.model.variant(self.normalization)
        return variant and replace(variant, source="")


def choose_variant(
    application: str, libraries: Collection[str], source_model: str | None, normalization: str | None
) -> Variant | None:
    """Return how the model computes that weights come from.

    It is never guessed: the tensors of several models have the same names and shapes.

    Args:
        application: Name of the model in `APPLICATIONS`.
        libraries: Libraries that name tensors as the file does.
        source_model: `--source-model`: `timm/tf_efficientnet_b0.in1k`, `torchvision/resnet50`, or without the library
            or the name of the weights.
        normalization: `--normalization`: a name in `NORMALIZATIONS`.

    Returns:
        The variant; None if it computes exactly as the model of `APPLICATIONS`.

    Raises:
        SettingError: If the options are wrong, or do not tell the variants of this application apart.
    """
    if not source_model and LITE_LIBRARY not in libraries:
        raise SettingError(_ask_for_source_model(application, libraries))
    models, tag = find_source_models(application, libraries), ""
    if source_model:
        models, tag = _parse_source_model(source_model, application, libraries)
    choices = [
        _Choice(model, name, tag)
        for model in models
        for name, tags in ({normalization: ()} if normalization else model.tags).items()
        if not tag or normalization or tag in tags
    ]
    unknown = [model for model in models if not model.tags and not normalization]
    computations = {choice.computation() for choice in choices}
    if unknown or len(computations) != 1:
        raise SettingError(_explain_ambiguity(models, choices))
    names = dict.fromkeys(str(choice.model) for choice in choices)
    variant = computations.pop()
    return variant and replace(variant, source=" or ".join(names) + (f".{tag}" if tag else ""))


def _parse_source_model(text: str, application: str, libraries: Collection[str]) -> tuple[list[SourceModel], str]:
    library, _, name = text.rpartition("/")
    name, _, tag = name.partition(".")
    candidates = find_source_models(application, libraries)
    found = [model for model in candidates if model.name == name and library in ("", model.library)]
    if not found:
        others = [model for model in SOURCE_MODELS if model.name == name and library in ("", model.library)]
        other = next((model.application for model in others if model.application != application), "")
        raise SettingError(
            f"--source-model is {text}{f', which is {other}' if other else ''}, but files with these tensor names are "
            f"converted to {application} only from {_join(candidates)}. Other models with equal tensors can compute "
            "differently."
        )
    if not tag:
        return found, ""
    tagged = [model for model in found if any(tag in tags for tags in model.tags.values())]
    if not tagged:
        known = sorted({known for model in found for tags in model.tags.values() for known in tags})
        raise SettingError(
            f"--source-model is {text}, but the known weights of {name} are {', '.join(known) or 'none'}. For others, "
            f"use --source-model {name} and --normalization."
        )
    return tagged, tag


def _ask_for_source_model(application: str, libraries: Collection[str]) -> str:
    models = find_source_models(application, libraries)
    similar = _SIMILAR.get(application)
    others = f" Cannot be converted although their tensors fit: {similar}." if similar else ""
    return (
        "A state dict does not contain how its model pads, strides and normalizes, and models with equal tensors "
        f"differ. Name the model that was trained: --source-model {' or '.join(map(str, models))}.{others}"
    )


def _explain_ambiguity(models: list[SourceModel], choices: list[_Choice]) -> str:
    """Name the weights among which the user has to choose."""
    options = [
        f"--normalization {choice.normalization} ({NORMALIZATIONS[choice.normalization].describe()})"
        + (f" for {', '.join(tags[:4])}" if (tags := choice.model.tags.get(choice.normalization, ())) else "")
        for choice in choices
    ]
    known = dict.fromkeys(options or [f"--normalization {name}" for name in NORMALIZATIONS])
    return (
        f"The file does not contain the input normalization that {_join(models)} was trained with, and there is more "
        f"than one. Name it: {'; '.join(known)}; or name the weights: --source-model NAME.TAG."
    )


def _join(models: list[SourceModel]) -> str:
    return ", ".join(map(str, models)) or "no model"


def _torchvision_models() -> Iterator[SourceModel]:
    names = {f"resnet{depth}": f"ResNet{depth}" for depth in (50, 101, 152)}
    names |= {f"densenet{depth}": f"DenseNet{depth}" for depth in (121, 169, 201)}
    names |= {f"efficientnet_b{size}": f"EfficientNetB{size}" for size in range(8)}
    names |= {f"mobilenet_v3_{size.lower()}": f"MobileNetV3{size}" for size in ("Small", "Large")}
    names |= {f"convnext_{size.lower()}": f"ConvNeXt{size}" for size in ("Tiny", "Small", "Base", "Large")}
    names |= {"vgg16": "VGG16", "vgg19": "VGG19", "mobilenet_v2": "MobileNetV2"}
    names |= {"efficientnet_v2_s": "EfficientNetV2S"}
    for name, application in names.items():
        tags: dict[str, tuple[str, ...]] = {"imagenet": ("IMAGENET1K_V1", "IMAGENET1K_V2")}
        if name == "vgg16":
            tags["caffe"] = ("IMAGENET1K_FEATURES",)
        yield SourceModel("torchvision", name, application, tags)


def _timm_models() -> Iterator[SourceModel]:
    for name, (application, tags) in TIMM_MODELS.items():
        yield SourceModel("timm", name, application, {key: tuple(value.split()) for key, value in tags.items()})


def _other_models() -> Iterator[SourceModel]:
    for size in ("Tiny", "Small", "Base", "Large", "XLarge"):
        yield SourceModel("facebookresearch", f"convnext_{size.lower()}", f"ConvNeXt{size}", {"imagenet": ()})
    yield SourceModel(LITE_LIBRARY, "efficientnet_lite0", "EfficientNetLite0", {"half": ()})


SOURCE_MODELS = (*_torchvision_models(), *_timm_models(), *_other_models())
