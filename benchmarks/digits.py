"""Scanned digits (UCI, as scikit-learn has them): 1,797 pictures of 8x8 pixels, which a base learns in minutes."""

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

SIDE = 64


def digits(folder: Path, classes: dict[str, tuple[int, ...]]) -> Path:
    """Write digits into class folders.

    Args:
        folder: Where they go.
        classes: Which digits each class holds.

    Returns:
        The folder.
    """
    found = load_digits()
    for name, members in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, (pixels, digit) in enumerate(zip(found.images, found.target, strict=True)):
            if digit in members:
                grey = Image.fromarray((pixels * 15.9).astype("uint8"))
                grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / name / f"{number:04}.png")
    return folder
