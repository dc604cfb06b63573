"""The policy of the feature cache: how many views are cached, and when caching is worth it."""

import keras
import pytest

from topwork.model.partition import Partition
from topwork.spec.model import Augmentation
from topwork.spec.training import FeatureCache
from topwork.training.feature_cache.policy import estimate_speedup, feature_cache_policy, should_cache_features


@pytest.fixture
def partition() -> Partition:
    """A cheap frozen part below an expensive trainable part."""
    image, features = keras.Input((8, 8, 3)), keras.Input((8, 8, 2))
    return Partition(
        keras.Model(image, keras.layers.Conv2D(2, 1)(image)), keras.Model(features, keras.layers.Conv2D(8, 3)(features))
    )


@pytest.mark.parametrize(
    ("setting", "epochs", "augmentation", "views", "disabled_reason"),
    [
        ("auto", 9, {}, 1, ""),
        ("auto", 9, {"flip": "both"}, 4, ""),
        ("auto", 3, {"flip": "both"}, 3, ""),
        ({"views": 7}, 9, {"flip": "both"}, 7, ""),
        ("off", 9, {}, 0, "featureCache is off"),
        ("auto", 9, {"cutMix": 1.0}, 0, "mixUp and cutMix mix different images at every step"),
    ],
)
def test_view_count_is_that_of_the_spec_or_one_per_epoch_up_to_four(
    setting, epochs, augmentation, views, disabled_reason
):
    cache = FeatureCache.model_validate(setting) if isinstance(setting, dict) else FeatureCache.from_setting(setting)
    policy = feature_cache_policy(cache, epochs, Augmentation.model_validate(augmentation), all_trained=False)
    assert (policy.views, policy.disabled_reason, policy.required) == (views, disabled_reason, False)


def test_features_are_not_cached_if_all_layers_are_trained_or_the_speedup_is_small(partition):
    disabled = feature_cache_policy(FeatureCache(use="on"), 9, Augmentation(), all_trained=True)
    assert should_cache_features(disabled, 9, None) == (False, "all layers of the base are trained")
    automatic = feature_cache_policy(FeatureCache(), 9, Augmentation(), all_trained=False)
    frozen, trainable = partition.multiplications
    expected = (9 * frozen + 27 * trainable) / (frozen + 27 * trainable)
    assert estimate_speedup(1, 9, partition) == pytest.approx(expected)
    assert should_cache_features(automatic, 9, partition) == (
        False,
        "the frozen layers run once instead of 9 times, about 1.0 times less computation",
    )
    assert should_cache_features(automatic, 9, None) == (False, "no frozen layers are below all trained layers")
    required = feature_cache_policy(FeatureCache(use="on"), 9, Augmentation(), all_trained=False)
    assert should_cache_features(required, 9, partition)[0]
