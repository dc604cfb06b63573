"""Findings of an audit: the content of `audit.json` and `suspects.csv`."""

import csv
import io
import math
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

Problem = Literal["blank", "blurred", "tiny"]
MAX_LISTED = 200
"""Images or pairs of each kind that `audit.json` lists; `suspects.csv` lists all."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True)


class AuditedImage(_Record):
    """An image of a split.

    Attributes:
        split: Name of the split.
        index: Position in the split.
        name: Name of the image in its source.
        class_name: Its class.
    """

    split: str
    index: int
    name: str
    class_name: str


class DuplicatePair(_Record):
    """Two images of different splits that show the same.

    Attributes:
        first: Image of the evaluated split, or of validation.
        second: Image of another split.
        similarity: 1 for equal pixels; otherwise the similarity of the aligned images, at most 1.
        is_exact: Whether the pixels are equal.
    """

    first: AuditedImage
    second: AuditedImage
    similarity: float
    is_exact: bool


class Overlap(_Record):
    """How many images of a split have a duplicate in another one.

    Attributes:
        split: Name of the split.
        other_split: Name of the other split.
        images: Number of images in the split.
        searched: Number of these for which near duplicates were searched: all, or a sample of a large split.
        exact: Images of the split with equal pixels in the other split.
        near: Other searched images with a near duplicate in the other split.
    """

    split: str
    other_split: str
    images: int
    searched: int
    exact: int
    near: int

    @property
    def ratio(self) -> float:
        """Fraction of the images of the split with a duplicate in the other split, estimated from those searched."""
        return min(1.0, self.exact / max(1, self.images) + self.near / max(1, self.searched))

    @property
    def duplicates(self) -> int:
        """Images of the split with an exact or near duplicate in the other split."""
        return self.exact + self.near

    def describe(self) -> str:
        """Return one sentence with the numbers."""
        if self.searched < self.images:
            return (
                f"{self.exact} of {self.images} {self.split} images have equal pixels in {self.other_split}, and "
                f"{self.near} of a sample of {self.searched} a near duplicate."
            )
        verb = "has" if self.duplicates == 1 else "have"
        exact = f" ({self.exact} with equal pixels)" if self.exact else ""
        return (
            f"{self.duplicates} of {self.images} {self.split} images {verb} a near duplicate in "
            f"{self.other_split}{exact}."
        )


class LabelIssue(_Record):
    """An image whose class is probably wrong.

    Attributes:
        image: The image, with its class in the dataset.
        suggested: The class that other images suggest.
        probability: Probability of its own class, from a model that was not trained on it.
    """

    image: AuditedImage
    suggested: str
    probability: float


class QualityIssue(_Record):
    """An image that may be useless.

    Attributes:
        image: The image.
        problem: blank, blurred or tiny.
    """

    image: AuditedImage
    problem: Problem


class FeatureSummary(_Record):
    """Distribution of the features of all images, which later versions are compared with.

    Attributes:
        key: Identifies the features: those with the same key can be compared.
        mean: Mean of each feature.
        deviation: Standard deviation of each feature.
    """

    key: str
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def distance(self, other: "FeatureSummary") -> float:
        """Return the mean standardized difference of the features, in standard deviations.

        Features that are constant in both datasets do not count. Of a single feature, 0.1 is usually considered small
        (Austin 2009, "Balance diagnostics for comparing the distribution of baseline covariates").
        """
        pooled = [math.sqrt((a * a + b * b) / 2) for a, b in zip(self.deviation, other.deviation, strict=True)]
        means = zip(self.mean, other.mean, pooled, strict=True)
        return fmean([abs(a - b) / scale for a, b, scale in means if scale] or [0.0])


class Drift(_Record):
    """How classes and images differ from those of the dataset of the last published version.

    Attributes:
        version: That version.
        dataset: Its dataset.
        distance: Total variation distance of the shares of the classes: 0 for equal shares, 1 for different classes.
        before: Images of each class in its dataset.
        now: Images of each class in this dataset.
        features: Mean standardized difference of the features of the images; None if they were not computed for both.
    """

    version: int
    dataset: str
    distance: float
    before: dict[str, int]
    now: dict[str, int]
    features: float | None = None

    def describe(self) -> str:
        """Return one sentence with the numbers."""
        images = "" if self.features is None else f", and the features of images by {self.features:.2f} deviations"
        return (
            f"Since version {self.version}, the shares of the classes have changed by {self.distance:.1%} (total "
            f"variation distance){images}."
        )


class AuditFindings(_Record):
    """The findings of an audit.

    Attributes:
        format: Version of this record.
        key: Digest of everything that the findings depend on.
        dataset: Key prefix of the stored dataset.
        evaluated_split: The split on which the model is evaluated; empty if there is none.
        images: Images of each split.
        overlaps: Duplicates across splits; None if nearDuplicates is off.
        pairs: Pairs of duplicates, those of the evaluated split and `train` first.
        contradictions: Images with the same pixels as an image of another class.
        label_issues: Number of images whose class is probably wrong; None if labelIssues is off.
        label_features: What the classes were predicted from: base or pixels.
        features: Distribution of the features of all images; None if labelIssues is off.
        label_examples: Images whose class is probably wrong, most certain first.
        quality: Number of images by problem.
        quality_examples: Images by problem.
        small_classes: Classes with few training images, and their number.
        drift: How classes and images changed since the last published version; None if there is none.
    """

    format: int = 1
    key: str
    dataset: str
    evaluated_split: str
    images: dict[str, int]
    overlaps: tuple[Overlap, ...] | None = None
    pairs: tuple[DuplicatePair, ...] = ()
    contradictions: int = 0
    label_issues: int | None = None
    label_features: str = ""
    features: FeatureSummary | None = None
    label_examples: tuple[LabelIssue, ...] = ()
    quality: dict[str, int] = {}
    quality_examples: tuple[QualityIssue, ...] = ()
    small_classes: dict[str, int] = {}
    drift: Drift | None = None

    @property
    def leak(self) -> Overlap | None:
        """Evaluated images with a duplicate in train; None if the audit did not search, or nothing is evaluated."""
        for overlap in self.overlaps or ():
            if (overlap.split, overlap.other_split) == (self.evaluated_split, "train"):
                return overlap
        return None

    @property
    def leak_ratio(self) -> float:
        """Fraction of evaluated images with a duplicate in train."""
        return self.leak.ratio if self.leak else 0.0

    def warnings(self) -> tuple[str, ...]:
        """Describe what makes published metrics doubtful."""
        return (f"{self.leak.describe()} The metrics may be optimistic.",) if self.leak and self.leak.duplicates else ()

    def without_long_lists(self) -> "AuditFindings":
        """Return the findings with at most `MAX_LISTED` images of each kind."""
        names = ("pairs", "label_examples", "quality_examples")
        return self.model_copy(update={name: getattr(self, name)[:MAX_LISTED] for name in names})

    def to_csv(self) -> bytes:
        """Return `suspects.csv`: one row for each pair or image that someone should look at."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("problem", "split", "image", "class", "other_split", "other_image", "other_class", "score"))
        for pair in self.pairs:
            problem = "exact duplicate" if pair.is_exact else "near duplicate"
            writer.writerow((problem, *_cells(pair.first), *_cells(pair.second), f"{pair.similarity:.3f}"))
        for issue in self.label_examples:
            score = f"{issue.probability:.3f}"
            writer.writerow(("label", *_cells(issue.image), "", "", issue.suggested, score))
        for useless in self.quality_examples:
            writer.writerow((useless.problem, *_cells(useless.image), "", "", "", ""))
        return text.getvalue().encode()


def _cells(image: AuditedImage) -> tuple[str, str, str]:
    return image.split, image.name, image.class_name
