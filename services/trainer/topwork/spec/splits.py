"""`spec.dataset.splits`: which images are used for training, validation and test."""

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, StrictBool, StrictFloat, StrictInt, StringConstraints, Tag

from topwork.spec.messages import format_value, join_words
from topwork.spec.slices import Slicing, parse_slices
from topwork.spec.spec_model import SpecModel, ValueDescription, Violation, rule
from topwork.spec.uris import ListUri, invalid_value

SPLIT_NAMES = ("train", "validation", "test")

Fraction = Annotated[
    StrictFloat, Field(gt=0.0, lt=1.0), ValueDescription("a fraction above 0 and below 1, such as 0.8")
]
Column = Annotated[str, StringConstraints(min_length=1, max_length=200), ValueDescription("the name of a column")]


def _validate_regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise invalid_value(f"{format_value(text)} is not a regular expression: {error}") from error
    return text


Regex = Annotated[
    str,
    StringConstraints(min_length=1, max_length=1000),
    AfterValidator(_validate_regex),
    ValueDescription("a regular expression"),
]


class FileList(SpecModel):
    """A list of the images of a split."""

    list: ListUri = Field(
        description="S3 object or local path of a text file with one image path per line, as in the source."
    )


def _share_tag(value: object) -> str:
    if isinstance(value, dict | FileList):
        return "<list>"
    return "<fraction>" if isinstance(value, int | float) and not isinstance(value, bool) else "<slice>"


Share = Annotated[
    Annotated[Fraction, Tag("<fraction>")]
    | Annotated[Slicing, Tag("<slice>")]
    | Annotated[FileList, Tag("<list>"), ValueDescription("{list: uri}")],
    Discriminator(_share_tag),
]


class GroupColumn(SpecModel):
    """Groups images by a column of the table."""

    column: Column = Field(description="Column with the group of each image.")


class GroupRegex(SpecModel):
    """Groups images by their names."""

    regex: Regex = Field(
        description="Regular expression (Python) that is searched in the name of each image, its path in the source. "
        "The group is its first capture group, or the whole match."
    )


GROUP_MODELS: dict[str, type[SpecModel]] = {"column": GroupColumn, "regex": GroupRegex}


def _group_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<folder>"
    for key, model in GROUP_MODELS.items():
        if isinstance(value, model) or (isinstance(value, dict) and key in value):
            return f"<{key}>"
    return None


GroupBy = Annotated[
    Annotated[Literal["folder"], Tag("<folder>")]
    | Annotated[GroupColumn, Tag("<column>")]
    | Annotated[GroupRegex, Tag("<regex>")],
    Discriminator(_group_tag),
    ValueDescription("folder, {column: name} or {regex: …}"),
]


class PerClass(SpecModel):
    """Exact number of images per class in each split."""

    train: StrictInt = Field(ge=1, description="Training images per class.")
    validation: StrictInt = Field(default=0, ge=0, description="Validation images per class.")
    test: StrictInt = Field(ge=1, description="Test images per class.")


class Splits(SpecModel):
    """Splits: fractions, slices, lists, counts per class, those of the source, or the folds of cross-validation."""

    train: Share | None = Field(
        default=None,
        description="Images used for training: a fraction of all images, such as 0.8, a TFDS slice, or {list: uri}, a "
        "text file with their paths.",
    )
    validation: Share | None = Field(
        default=None,
        description="Images used for early stopping and for selecting the best epoch, such as 0.1, train[40%:50%] or "
        "{list: uri}.",
    )
    test: Share | None = Field(
        default=None,
        description="Images used to evaluate the final model, such as 0.1, train[50%:60%] or {list: uri}. Unset: the "
        "validation split.",
    )
    pin_test: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="Version of the model whose test images are the test split again, so that versions stay comparable "
        "while the dataset grows. All other images are divided by the fractions.",
    )
    predefined: StrictBool = Field(
        default=False,
        description="Whether to use the splits of the source, like the short form splits: auto, with groupBy or "
        "stratify: a group in several of them is an error.",
    )
    stratify: StrictBool = Field(
        default=True,
        description="Whether fractions, and a tenth of the train split that replaces a missing predefined split, apply "
        "to each class, so that every split contains every class in the same proportion. Slices are never stratified, "
        "counts per class always.",
    )
    group_by: GroupBy | None = Field(
        default=None,
        description="Keeps images of a group, such as a patient, a camera or a series, in one split: folder (the "
        "directory that contains the image, below its class), {column: name} of the table, or {regex: …}. With "
        "fractions, which are then approximate, or with predefined splits and lists.",
    )
    per_class: PerClass | None = Field(
        default=None, description="Exact number of images per class. Cannot be combined with fractions or slices."
    )

    folds: Annotated[StrictInt, Field(ge=2, le=20)] | None = Field(
        default=None,
        description="Cross-validation: divides the images into this many parts of the same size. Each of them is the "
        "test split of one training, and all others, without the fraction for validation, train.",
    )
    fold: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="Trains only this fold, from 1 to folds. Unset: all folds, one after the other."
    )

    @classmethod
    def from_setting(cls, setting: "Splits | Literal['auto']") -> "Splits":
        """Expand the short form (`auto`) of `splits`; a full setting is returned unchanged."""
        return setting if isinstance(setting, Splits) else cls(predefined=True)

    @property
    def shares(self) -> dict[str, float | str | FileList]:
        """The fraction, slice or list of each split that is set."""
        return {name: share for name in SPLIT_NAMES if (share := getattr(self, name)) is not None}

    @property
    def fractions(self) -> dict[str, float]:
        """The fraction of each split; empty if the splits are not fractions."""
        return {name: share for name, share in self.shares.items() if isinstance(share, float)}

    @property
    def slices(self) -> dict[str, str]:
        """The slice of each split; empty if the splits are not slices."""
        return {name: share for name, share in self.shares.items() if isinstance(share, str)}

    @property
    def lists(self) -> dict[str, str]:
        """The URI or path of the list of each split; empty if the splits are not lists."""
        return {name: share.list for name, share in self.shares.items() if isinstance(share, FileList)}

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        has_counts = self.per_class is not None and self.per_class.validation > 0
        return self.predefined or self.validation is not None or has_counts


def _splits_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<name>"
    return "<mapping>" if isinstance(value, dict | Splits) else None


SplitsSetting = Annotated[
    Annotated[Literal["auto"], Tag("<name>")] | Annotated[Splits, Tag("<mapping>")],
    Discriminator(_splits_tag),
]


@rule(Splits)
def one_kind_of_splits(splits: Splits) -> Iterator[Violation]:
    """Fractions, slices, lists, counts per class and the splits of the source would define the same splits twice."""
    if splits.predefined and (others := [*splits.shares, *(["perClass"] if splits.per_class else [])]):
        yield Violation(
            "predefined",
            f"cannot be combined with {join_words(others)}: it uses the splits of the source. Remove one of them.",
        )
    if splits.per_class and splits.shares:
        yield Violation(
            "perClass",
            f"cannot be combined with {join_words(list(splits.shares))}. Use either counts per class, fractions, "
            "slices or lists.",
        )
    if splits.lists and (others := [name for name in splits.shares if name not in splits.lists]):
        yield Violation(
            others[0],
            f"{format_value(splits.shares[others[0]])} is not a list of images, but {next(iter(splits.lists))} is one. "
            "Use lists for all splits or for none.",
        )
    if splits.fractions and splits.slices:
        (fraction, value), (slice_, text) = next(iter(splits.fractions.items())), next(iter(splits.slices.items()))
        yield Violation(
            slice_,
            f"{text} is a slice, but {fraction} is the fraction {value:g} of all images. Use only fractions or only "
            "slices.",
        )


@rule(Splits)
def training_split_is_set(splits: Splits) -> Iterator[Violation]:
    """Training needs a training split."""
    if not (splits.per_class or splits.predefined or splits.folds) and splits.train is None:
        yield Violation("train", "is required. Set a fraction, such as train: 0.8, or use perClass.")


@rule(Splits)
def evaluation_split_is_set(splits: Splits) -> Iterator[Violation]:
    """Only an evaluated model is published. Without a test split, the validation split is used."""
    is_set = splits.per_class or splits.predefined or splits.pin_test or splits.folds
    if not is_set and splits.test is None and splits.validation is None:
        example = "train[80%:]" if splits.slices else "{list: test.txt}" if splits.lists else "0.1"
        yield Violation("test", f"is required if there is no validation split. Set it, such as test: {example}.")


@rule(Splits)
def pinned_test_set_is_combined_with_fractions(splits: Splits) -> Iterator[Violation]:
    """The test split is either new or that of an earlier version, and the other images are divided by fractions."""
    if splits.pin_test is None:
        return
    if splits.test is not None:
        yield Violation(
            "pinTest",
            f"{splits.pin_test} cannot be combined with test: the test split is that of version {splits.pin_test}. "
            "Remove one of them.",
        )
    elif not splits.fractions and not splits.folds:
        yield Violation(
            "pinTest",
            f"{splits.pin_test} needs fractions for all other images. Use fractions, such as {{train: 0.9, validation: "
            f"0.1, pinTest: {splits.pin_test}}}, or remove pinTest.",
        )


@rule(Splits)
def fractions_are_at_most_all_images(splits: Splits) -> Iterator[Violation]:
    """Each image belongs to one split."""
    total = sum(splits.fractions.values())
    if total > 1 + 1e-9:
        given = " + ".join(f"{value:g}" for value in splits.fractions.values())
        yield Violation("train", f"{given} is {total:g}, but the fractions of all splits must add up to at most 1.")


@rule(Splits)
def options_of_fractions(splits: Splits) -> Iterator[Violation]:
    """Slices and counts per class are taken without regard to groups, and are always or never stratified."""
    if splits.fractions or splits.predefined or splits.folds:
        return
    if not splits.stratify:
        yield Violation(
            "stratify",
            "applies only to fractions, such as train: 0.8, and to predefined: true. Remove it, or use fractions.",
        )
    if splits.group_by and not splits.lists:
        yield Violation(
            "groupBy",
            "applies only to fractions, such as train: 0.8, to lists and to predefined: true. Remove it, or use "
            "fractions.",
        )


@rule(Splits)
def folds_define_the_test_split(splits: Splits) -> Iterator[Violation]:
    """Each image is in the test split of one fold and trains the others."""
    if not splits.folds:
        if splits.fold:
            yield Violation("fold", "selects a fold of cross-validation. Set folds, too, or remove fold.")
        return
    given = {
        "train": splits.train,
        "test": splits.test,
        "perClass": splits.per_class,
        "predefined": splits.predefined,
        "pinTest": splits.pin_test,
        "validation": splits.slices or splits.lists,
    }
    for key in (key for key, value in given.items() if value):
        yield Violation(
            key,
            "cannot be combined with folds, which define the splits. Set only validation, to a fraction such as 0.1."
            if key == "validation"
            else "cannot be combined with folds, which define the splits. Remove one of them.",
        )
    validation = splits.fractions.get("validation", 0.0)
    if validation + 1 / splits.folds > 1 - 1e-9:
        yield Violation(
            "validation",
            f"{validation:g} and the test split, 1/{splits.folds} of the images, leave nothing to train on. Lower it.",
        )
    if splits.fold and splits.fold > splits.folds:
        yield Violation("fold", f"is {splits.fold}, but there are only {splits.folds} folds.")


@rule(Splits)
def splits_do_not_overlap(splits: Splits) -> Iterator[Violation]:
    """Evaluating on training images overestimates the quality of the model."""
    for (first, first_text), (second, second_text) in combinations(splits.slices.items(), 2):
        if any(
            left.definitely_overlaps(right) for left in parse_slices(first_text) for right in parse_slices(second_text)
        ):
            yield Violation(
                second,
                f"{second_text} overlaps {first}: {first_text}. Shared images make the metrics too optimistic. "
                "Choose slices that do not overlap.",
            )
