"""Near duplicates of real photographs are found, and other photographs and flat images do not match."""

import io
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from topwork.audit import near_duplicates
from topwork.audit.near_duplicates import NearDuplicates
from topwork.data.images.signature import THUMBNAIL_PIXELS, sign_image

# Parts of a photograph that do not overlap are as different as two photographs of the same scene.
PARTS = 4


def load_photographs():
    photographs = []
    for name in ("china.jpg", "flower.jpg"):
        image = Image.open(str(resources.files("sklearn.datasets") / "images" / name)).convert("RGB")
        width, height = image.width // PARTS, image.height // PARTS
        boxes = [(x * width, y * height) for x in range(PARTS) for y in range(PARTS)]
        photographs += [image.crop((x, y, x + width, y + height)) for x, y in boxes]
    return photographs


def thumbnails(images):
    values = b"".join(sign_image(image).thumbnail for image in images)
    return np.frombuffer(values, np.uint8).reshape(-1, THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)


PHOTOGRAPHS = load_photographs()
CORPUS = thumbnails(PHOTOGRAPHS)
SEARCH = NearDuplicates(CORPUS)
# Plain sky and out-of-focus leaves have nothing that could be compared.
DETAILED = np.flatnonzero(near_duplicates.measure_detail(CORPUS) >= 1.5 * near_duplicates.MIN_DETAIL)


def compress(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def crop(image, left, top):
    width, height = round(0.9 * image.width), round(0.9 * image.height)
    x, y = round(left * (image.width - width)), round(top * (image.height - height))
    return image.crop((x, y, x + width, y + height))


CHANGES = {
    "compressed": lambda image, a, b: compress(image, int(40 + 50 * a)),
    "resized": lambda image, a, b: image.resize((round(image.width * (0.5 + a)), round(image.height * (0.5 + a)))),
    "cropped": crop,
    "mirrored": lambda image, a, b: ImageOps.mirror(image),
    "brightened": lambda image, a, b: ImageEnhance.Brightness(image).enhance(0.75 + 0.5 * a),
    "all": lambda image, a, b: compress(ImageOps.mirror(crop(image, a, b)), 60),
}
POSITION = st.floats(0, 1)


@pytest.mark.parametrize("change", CHANGES)
@given(left=POSITION, top=POSITION)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_copies_of_photographs_are_found(change, left, top):
    copies = thumbnails([CHANGES[change](PHOTOGRAPHS[index], left, top) for index in DETAILED])
    matches = SEARCH.find(copies, CORPUS)
    found = {(DETAILED[query], corpus) for query, corpus in zip(matches.query, matches.corpus, strict=True)}
    recall = np.mean([(index, index) in found for index in DETAILED])
    assert recall >= 0.95
    assert len(found) - recall * len(DETAILED) <= 1


def test_different_photographs_do_not_match():
    matches = SEARCH.find(CORPUS[:16], CORPUS[16:])
    assert matches.query.tolist() == []


def test_flat_images_do_not_match():
    gradient = Image.linear_gradient("L").convert("RGB").resize((200, 200))
    flat = [Image.new("RGB", (200, 200), color) for color in ("black", "white", "red", "#808080")]
    noisy = [compress(image, 30) for image in flat]
    images = thumbnails([*flat, *noisy, gradient, ImageOps.mirror(gradient), gradient.rotate(90)])
    search = NearDuplicates(np.concatenate([CORPUS, images]))
    assert search.find(images, images).query.tolist() == []


def test_all_copies_of_a_group_are_found():
    index = DETAILED[3]
    copies = [CHANGES["compressed"](PHOTOGRAPHS[index], quality, 0) for quality in (0.1, 0.4, 0.7)]
    matches = SEARCH.find(CORPUS[[index]], np.concatenate([CORPUS[:index], thumbnails(copies)]))
    assert sorted(matches.corpus.tolist()) == [index, index + 1, index + 2]


def test_a_dataset_of_two_images_is_searched():
    pair = thumbnails([PHOTOGRAPHS[DETAILED[0]], CHANGES["mirrored"](PHOTOGRAPHS[DETAILED[0]], 0, 0)])
    assert NearDuplicates(pair).find(pair[:1], pair[1:]).corpus.tolist() == [0]


def test_block_size_does_not_change_what_is_found(monkeypatch):
    copies = thumbnails([CHANGES["cropped"](image, 0.3, 0.8) for image in PHOTOGRAPHS])
    whole = SEARCH.find(copies, CORPUS)
    for name, size in (("_QUERY_BLOCK", 5), ("_CORPUS_BLOCK", 7), ("_VERIFY_BLOCK", 3)):
        monkeypatch.setattr(near_duplicates, name, size)
    parts = SEARCH.find(copies, CORPUS)
    assert set(zip(whole.query.tolist(), whole.corpus.tolist(), strict=True)) == set(
        zip(parts.query.tolist(), parts.corpus.tolist(), strict=True)
    )
    assert len(whole.query) >= 20
