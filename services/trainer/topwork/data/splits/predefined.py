"""Predefined splits, those of the source (`splits: auto`): their names, and what replaces a missing one."""

from collections.abc import Iterable, Mapping

from topwork.errors import DataError
from topwork.spec.splits import SPLIT_NAMES, Splits

# Spellings of the names of splits, in lower case. `dev` and `eval` as in Hugging Face Datasets.
_SPELLINGS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
CARVED_FRACTION = 0.1
"""Fraction of each class of the train split that replaces a missing validation or test split."""


def split_of_name(name: str) -> str | None:
    """Return the split that a directory, label or TFDS split stands for: train, validation or test; None for others.

    Example:
        >>> split_of_name("Val")
        'validation'
    """
    return _SPELLINGS.get(name.strip().lower())


def format_spellings() -> str:
    """List the accepted names for messages."""
    return ", ".join(_SPELLINGS)


def match_splits(names: Iterable[str], origin: str) -> dict[str, str]:
    """Find the splits among names.

    Args:
        names: Names of directories or TFDS splits; those that are not names of splits are left out.
        origin: URI or name of the source for messages.

    Returns:
        The name of each split that exists, in the order train, validation, test.

    Raises:
        DataError: If two names stand for the same split, or none for train.
    """
    found: dict[str, str] = {}
    for name in names:
        if (split := split_of_name(name)) is None:
            continue
        if split in found:
            raise DataError(
                f"{origin} contains {found[split]} and {name}, which both stand for the {split} split. Rename or merge "
                "them."
            )
        found[split] = name
    if "train" not in found:
        raise DataError(
            f"{origin} has no train split, which the predefined splits of spec.dataset.splits need. It has "
            f"{', '.join(found.values()) or 'none'}. Accepted names: {format_spellings()}."
        )
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def carved_fractions(splits: Iterable[str]) -> dict[str, float]:
    """Return the fractions of the train split that become train, and the validation or test split that is missing.

    Args:
        splits: The splits of the source.

    Returns:
        Empty if no split is missing.

    Example:
        >>> carved_fractions(["train", "test"])
        {'train': 0.9, 'validation': 0.1}
    """
    missing = [split for split in ("validation", "test") if split not in splits]
    if not missing:
        return {}
    return {"train": 1 - CARVED_FRACTION * len(missing), **dict.fromkeys(missing, CARVED_FRACTION)}


def describe_predefined(splits: Splits, source_splits: Mapping[str, object], origin: str) -> tuple[str, ...]:
    """Describe what becomes of the splits of a source, if this is not obvious.

    Args:
        splits: `spec.dataset.splits`.
        source_splits: The splits of the stored dataset, by their names in the source.
        origin: URI or name of the source.

    Returns:
        Sentences for the log and the report.
    """
    found = match_splits(source_splits, origin)
    carved = [split for split in carved_fractions(found) if split != "train"]
    unused = [name for name in source_splits if name not in found.values()]
    share = f"{CARVED_FRACTION:.0%} of {'each class of ' if splits.stratify else ''}its train split"
    if splits.group_by:
        share = f"About {share}, in whole groups,"
    notes = [f"The source has no {split} split. {share} replace it." for split in carved]
    notes += [f"The split {name} of the source is not used." for name in unused]
    return tuple(notes)
