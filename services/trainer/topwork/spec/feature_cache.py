"""Whether what the frozen part of a model gives is computed once and kept."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from topwork.spec.section import Part, Refusal, Whole, rule

CacheUse = Literal["auto", "on", "off"]


class FeatureCache(Part):
    """Whether what the frozen part of the model gives is computed once, and for how many views of an image."""

    use: CacheUse = Field(default="auto", description="auto: where that takes less time, which the log explains.")
    views: Annotated[Whole, Field(ge=1, le=100)] | None = Field(
        default=None,
        description="Augmented views of each training image; epochs take them in turn. Without it one an epoch, 4 at "
        "most.",
    )

    @classmethod
    def of(cls, setting: "FeatureCache | CacheUse") -> "FeatureCache":
        """Give a setting with all its parts, also where only the word stands."""
        return setting if isinstance(setting, FeatureCache) else cls(use=setting)


def _cache_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<name>"
    return "<mapping>" if isinstance(value, dict | FeatureCache) else None


CacheSetting = Annotated[
    Annotated[CacheUse, Tag("<name>")] | Annotated[FeatureCache, Tag("<mapping>")], Discriminator(_cache_kind)
]


@rule(FeatureCache)
def views_belong_to_a_cache(cache: FeatureCache) -> Iterator[Refusal]:
    """Without a cache each step has a view of its own."""
    if cache.use == "off" and cache.views is not None:
        yield Refusal("views", f"{cache.views} goes with a cache, but use is off. Take it out, or set use: auto.")


def views_are_seen(cache: FeatureCache, epochs: int) -> Iterator[Refusal]:
    """Refuse more views than a stage has epochs: each epoch takes one view of an image.

    Args:
        cache: The stage's cache.
        epochs: Its epochs; 0 where they aren't known.

    Yields:
        At most one refusal, relative to the stage.
    """
    if cache.views is not None and epochs and cache.views > epochs:
        yield Refusal(
            "featureCache.views",
            f"{cache.views} is above epochs {epochs}: each epoch takes one view of an image, so that the others would "
            f"never be seen. Use {epochs} at most.",
        )
