"""Images of handwritten digits for benchmarks: 1,797 images of 8x8 pixels from UCI, included in scikit-learn."""

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

SIDE = 64


def write_digits(directory: Path, classes: dict[str, tuple[int, ...]]) -> Path:
    """Write images of digits to one directory per class.

    Args:
        directory: Parent of the class directories.
        classes: Digits in each class.

    Returns:
        `directory`.
    """
    dataset = load_digits()
    for name, class_digits in classes.items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        for number, (pixels, digit) in enumerate(zip(dataset.images, dataset.target, strict=True)):
            if digit in class_digits:
                image = Image.fromarray((pixels * 15.9).astype("uint8"))
                image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(directory / name / f"{number:04}.png")
    return directory
