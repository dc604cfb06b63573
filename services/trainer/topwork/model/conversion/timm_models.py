"""Models of timm 1.0 that keras.applications has too, and the normalization of each of their pretrained weights."""

from collections.abc import Mapping

TIMM_MODELS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "resnet50": (
        "ResNet50",
        {
            "imagenet": (
                "a1_in1k a1h_in1k a2_in1k a3_in1k am_in1k b1k_in1k b2k_in1k bamboo bt_in1k c1_in1k c2_in1k "
                "d_in1k fb_ssl_yfcc100m_ft_in1k fb_swsl_ig1b_ft_in1k gluon_in1k ra_in1k ram_in1k tv2_in1k "
                "tv_in1k"
            ),
        },
    ),
    "resnet101": ("ResNet101", {"imagenet": "a1_in1k a1h_in1k a2_in1k a3_in1k gluon_in1k tv2_in1k tv_in1k"}),
    "resnet152": ("ResNet152", {"imagenet": "a1_in1k a1h_in1k a2_in1k a3_in1k gluon_in1k tv2_in1k tv_in1k"}),
    "vgg16": ("VGG16", {"imagenet": "tv_in1k"}),
    "vgg19": ("VGG19", {"imagenet": "tv_in1k"}),
    "mobilenetv2_100": ("MobileNetV2", {"imagenet": "ra_in1k"}),
    "densenet121": ("DenseNet121", {"imagenet": "ra_in1k tv_in1k"}),
    "densenet169": ("DenseNet169", {"imagenet": "tv_in1k"}),
    "densenet201": ("DenseNet201", {"imagenet": "tv_in1k"}),
    "mobilenetv3_small_100": ("MobileNetV3Small", {"imagenet": "lamb_in1k"}),
    "mobilenetv3_large_100": (
        "MobileNetV3Large",
        {"none": "miil_in21k miil_in21k_ft_in1k", "half": "ra4_e3600_r224_in1k", "imagenet": "ra_in1k"},
    ),
    "tf_mobilenetv3_small_100": ("MobileNetV3Small", {"half": "in1k"}),
    "tf_mobilenetv3_large_100": ("MobileNetV3Large", {"half": "in1k"}),
    "efficientnet_b0": ("EfficientNetB0", {"half": "ra4_e3600_r224_in1k", "imagenet": "ra_in1k"}),
    "efficientnet_b1": ("EfficientNetB1", {"imagenet": "ft_in1k", "half": "ra4_e3600_r240_in1k"}),
    "efficientnet_b2": ("EfficientNetB2", {"imagenet": "ra_in1k"}),
    "efficientnet_b3": ("EfficientNetB3", {"imagenet": "ra2_in1k"}),
    "efficientnet_b4": ("EfficientNetB4", {"imagenet": "ra2_in1k"}),
    "efficientnet_b5": ("EfficientNetB5", {"imagenet": "sw_in12k sw_in12k_ft_in1k"}),
    "efficientnet_b6": ("EfficientNetB6", {}),
    "efficientnet_b7": ("EfficientNetB7", {}),
    "tf_efficientnet_b0": ("EfficientNetB0", {"imagenet": "aa_in1k in1k ns_jft_in1k", "half": "ap_in1k"}),
    "tf_efficientnet_b1": ("EfficientNetB1", {"imagenet": "aa_in1k in1k ns_jft_in1k", "half": "ap_in1k"}),
    "tf_efficientnet_b2": ("EfficientNetB2", {"imagenet": "aa_in1k in1k ns_jft_in1k", "half": "ap_in1k"}),
    "tf_efficientnet_b3": ("EfficientNetB3", {"imagenet": "aa_in1k in1k ns_jft_in1k", "half": "ap_in1k"}),
    "tf_efficientnet_b4": ("EfficientNetB4", {"imagenet": "aa_in1k in1k ns_jft_in1k", "half": "ap_in1k"}),
    "tf_efficientnet_b5": ("EfficientNetB5", {"imagenet": "aa_in1k in1k ns_jft_in1k ra_in1k", "half": "ap_in1k"}),
    "tf_efficientnet_b6": ("EfficientNetB6", {"imagenet": "aa_in1k ns_jft_in1k", "half": "ap_in1k"}),
    "tf_efficientnet_b7": ("EfficientNetB7", {"imagenet": "aa_in1k ns_jft_in1k ra_in1k", "half": "ap_in1k"}),
    "tf_efficientnetv2_b0": ("EfficientNetV2B0", {"imagenet": "in1k"}),
    "tf_efficientnetv2_b1": ("EfficientNetV2B1", {"imagenet": "in1k"}),
    "tf_efficientnetv2_b2": ("EfficientNetV2B2", {"imagenet": "in1k"}),
    "tf_efficientnetv2_b3": ("EfficientNetV2B3", {"imagenet": "in1k", "half": "in21k in21k_ft_in1k"}),
    "tf_efficientnetv2_s": ("EfficientNetV2S", {"half": "in1k in21k in21k_ft_in1k"}),
    "efficientnetv2_s": ("EfficientNetV2S", {}),
    "convnext_tiny": (
        "ConvNeXtTiny",
        {
            "imagenet": (
                "dinov3_lvd1689m eupe_lvd1689m fb_in1k fb_in22k fb_in22k_ft_in1k fb_in22k_ft_in1k_384 in12k "
                "in12k_ft_in1k in12k_ft_in1k_384"
            ),
        },
    ),
    "convnext_small": (
        "ConvNeXtSmall",
        {
            "imagenet": (
                "dinov3_lvd1689m eupe_lvd1689m fb_in1k fb_in22k fb_in22k_ft_in1k fb_in22k_ft_in1k_384 in12k "
                "in12k_ft_in1k in12k_ft_in1k_384"
            ),
        },
    ),
    "convnext_base": (
        "ConvNeXtBase",
        {
            "clip": (
                "clip_laion2b clip_laion2b_augreg clip_laion2b_augreg_ft_in1k clip_laion2b_augreg_ft_in12k "
                "clip_laion2b_augreg_ft_in12k_in1k clip_laion2b_augreg_ft_in12k_in1k_384 clip_laiona "
                "clip_laiona_320 clip_laiona_augreg_320 clip_laiona_augreg_ft_in1k_384"
            ),
            "imagenet": "dinov3_lvd1689m eupe_lvd1689m fb_in1k fb_in22k fb_in22k_ft_in1k fb_in22k_ft_in1k_384",
        },
    ),
    "convnext_large": (
        "ConvNeXtLarge",
        {"imagenet": "dinov3_lvd1689m fb_in1k fb_in22k fb_in22k_ft_in1k fb_in22k_ft_in1k_384"},
    ),
    "convnext_xlarge": ("ConvNeXtXLarge", {"imagenet": "fb_in22k fb_in22k_ft_in1k fb_in22k_ft_in1k_384"}),
}
"""Name in timm to the name in keras.applications, and the tags of the pretrained weights with each normalization:
`mean` and `std` of `timm.get_pretrained_cfg`. Generated and checked by tests/conversion/timm_reference.py."""
