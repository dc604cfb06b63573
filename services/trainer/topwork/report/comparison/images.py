"""Selects the images on which several models can be compared fairly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from topwork.data.local_dataset import LocalDataset, Split
from topwork.data.sources.source import normalize_name
from topwork.errors import DataError
from topwork.report.comparison.candidates import Candidate
from topwork.spec.messages import count_noun, join_words

SELECTED_ON_VALIDATION = (
    "The validation split also selected the best epoch of each model, so its metrics are optimistic."
)
TRIALS = (
    "{names} never publish{es}, as the trials of a search, so the validation split is compared: the test split would "
    "not be independent any more if it helped to choose between them."
)


@dataclass(frozen=True)
class ComparedImages:
    """Images that no model was trained on, and the split that they come from.

    Attributes:
        split: test, or validation.
        images: The images.
        class_names: Name of each class, in label order.
        described: The images in words.
        notes: Caveats, in sentences.
    """

    split: Literal["test", "validation"]
    images: Split
    class_names: tuple[str, ...]
    described: str
    notes: tuple[str, ...]


def select_compared_images(candidates: Sequence[Candidate], splits: Sequence[LocalDataset]) -> ComparedImages:
    """Select the images of the first model's test split that no model was trained on, or selected with.

    Trials of a search, and a first model without a test split, are compared on the images that are in the validation
    splits of all models: each has selected its best epoch with them.

    Args:
        candidates: The models.
        splits: The splits of each.

    Returns:
        The images, in the form of the first model.

    Raises:
        DataError: If no image is left.
    """
    trials = [candidate.name for candidate in candidates if candidate.is_trial]
    first = splits[0]
    split: Literal["test", "validation"] = "test" if first.test is not None and not trials else "validation"
    images = first.test if split == "test" else first.validation
    if images is None or not images.size:
        raise DataError(f"{candidates[0].name} has no {split} split, so there are no images to compare models on.")
    usable = np.ones(images.size, bool)
    left_out = []
    for candidate, local in zip(candidates, splits, strict=True):
        fair = _is_fair(images, local, split)
        usable &= fair
        if count := int(np.count_nonzero(~fair)):
            left_out.append(f"{count} because of {candidate.name}")
    origin = f"the {split} split of {candidates[0].name}"
    rule = "it was trained on them or selected with them" if split == "test" else "they are not in its validation split"
    if not usable.any():
        raise DataError(
            f"No image of {origin} is left to compare on: {join_words(left_out)} cannot be used, because {rule}. "
            "Compare models of the same splits (spec.dataset.splits, spec.seed), or keep the test set with pinTest."
        )
    notes = _explain_split(split, trials)
    if left_out:
        notes.append(f"Of {count_noun(images.size, 'image')}, {join_words(left_out)} are left out: {rule}.")
    images = images.subset(np.flatnonzero(usable))
    notes += _find_relabeled(images, candidates, splits)
    described = f"{count_noun(images.size, 'image')} of {origin}"
    return ComparedImages(split, images, first.class_names, described, tuple(notes))


def _is_fair(images: Split, local: LocalDataset, split: str) -> NDArray[np.bool_]:
    """Return which images a model may be compared on. Images with equal pixels are the same image."""
    validation = np.zeros(0, np.uint64) if local.validation is None else local.validation.digests
    is_trained = np.isin(images.digests, local.train.digests)
    is_validation = np.isin(images.digests, validation)
    return ~is_trained & (~is_validation if split == "test" else is_validation)


def _explain_split(split: str, trials: Sequence[str]) -> list[str]:
    if split == "test":
        return []
    reason = [TRIALS.format(names=join_words(list(trials)), es="es" if len(trials) == 1 else "")] if trials else []
    return [*reason, SELECTED_ON_VALIDATION]


def _find_relabeled(images: Split, candidates: Sequence[Candidate], splits: Sequence[LocalDataset]) -> list[str]:
    """Say how many images have another class in the dataset of another model."""
    notes, names = [], splits[0].class_names
    for candidate, local in zip(candidates[1:], splits[1:], strict=True):
        if candidate.dataset.prefix == candidates[0].dataset.prefix or local.records is None:
            continue
        known = dict(zip(local.records.digests.tolist(), local.records.labels.tolist(), strict=True))
        pairs = zip(images.digests.tolist(), images.labels.tolist(), strict=True)
        relabeled = sum(
            normalize_name(local.class_names[known[digest]]) != normalize_name(names[label])
            for digest, label in pairs
            if digest in known
        )
        if relabeled:
            have = "has" if relabeled == 1 else "have"
            notes.append(
                f"{count_noun(relabeled, 'image')} {have} another class in the dataset of {candidate.name}; the "
                f"classes are those of {candidates[0].name}."
            )
    return notes
