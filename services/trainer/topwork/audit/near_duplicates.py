"""Near duplicates: copies of an image that were compressed, resized, cropped to 90 %, mirrored or made brighter.

Two steps. Candidates: each image is described by a vector of 64 numbers, also mirrored and for some windows, and block
by block all vectors of one set are multiplied with all of another one. Verification: the best candidates of each image
are aligned, and compared in more detail.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from topwork.audit.alignment import WHOLE, WINDOWS, FloatArray, align_windows, cut_windows
from topwork.audit.whitening import Whitening, cosine_basis

# Sides in pixels of what is compared to find and to verify candidates.
_CANDIDATE_SIDE, _SIDE = 8, 24
_NOISE = 0.05
MIN_CANDIDATE_SIMILARITY = 0.5
MIN_WHOLE_SIMILARITY, MIN_CUT_SIMILARITY = 0.88, 0.76
"""Similarity from which two images are near duplicates, if they show the same, and if one is cut from the other. The
second is lower, because alignment is not exact, and because images that only look alike rarely fit a window."""

MAX_CANDIDATES = 16
"""Candidates of an image that are verified, and near duplicates of it that are reported."""

_MIN_DETAIL_SHARE = 0.15
# Alignment can stop at a wrong window, so the most similar variants are both tried.
_TRIED_VARIANTS = 2
# A window of at least this size is the whole image.
_WHOLE_SIZE = 0.98
MIN_DETAIL, MIN_DETAIL_OF_COPY = 3.0, 2.0
"""Standard deviation in gray values below which images have no details that could be compared: in one of two images,
and in the other one, which may be a darker copy."""

_FIT_IMAGES = 3000
_QUERY_BLOCK, _CORPUS_BLOCK, _VERIFY_BLOCK = 8192, 2048, 1024

Thumbnails = npt.NDArray[np.uint8]


class ThumbnailSource(Protocol):
    """An array of thumbnails, or an object that reads them from a file."""

    def __len__(self) -> int:
        """Return the number of thumbnails."""

    def __getitem__(self, selection: Any, /) -> Any:
        """Return the thumbnails that a slice or an array of indices selects, uint8 (k, side, side)."""


Indices = npt.NDArray[np.int64]


class _Variant(NamedTuple):
    """A way in which one image can be a copy of another one."""

    is_mirrored: bool
    cuts_second: bool
    window: tuple[float, float, float]


_VARIANTS = tuple(
    _Variant(is_mirrored, cuts_second, window)
    for is_mirrored in (False, True)
    for cuts_second in (False, True)
    for window in (WINDOWS[1:] if cuts_second else WINDOWS)
)


@dataclass(frozen=True)
class Matches:
    """Near duplicates between two sets of images.

    Attributes:
        query: Index in the first set, int64 (n,).
        corpus: Index in the second set, int64 (n,).
        similarity: float64 (n,), at most 1.
    """

    query: Indices
    corpus: Indices
    similarity: FloatArray


class NearDuplicates:
    """Finds near duplicates between images of one dataset."""

    def __init__(self, thumbnails: ThumbnailSource) -> None:
        """Measure what the images of a dataset have in common.

        Args:
            thumbnails: Thumbnails of the dataset, uint8 (n, side, side). A few thousand are used.
        """
        chosen = np.linspace(0, len(thumbnails) - 1, min(len(thumbnails), _FIT_IMAGES)).astype(np.int64)
        sample = thumbnails[chosen]
        images = sample[measure_detail(sample) >= MIN_DETAIL_OF_COPY].astype(np.float64)
        images = np.concatenate([images, images[..., ::-1]])
        # Windows count too: otherwise, two images that are cut in the same way would differ from the others alike.
        random = np.random.default_rng(0)
        sizes = random.uniform(0.88, 1.0, (len(images), 1))
        windows = np.hstack([sizes, random.uniform(0.0, 1.0, (len(images), 2)) * (1.0 - sizes)])
        parts = [cut_windows(images, np.array([window]), _CANDIDATE_SIDE) for window in WINDOWS]
        self._coarse = Whitening.fit(np.concatenate(parts), _NOISE)
        parts = [cut_windows(images, np.array([WHOLE]), _SIDE), cut_windows(images, windows, _SIDE)]
        self._fine = Whitening.fit(np.concatenate(parts), _NOISE)

    def find(self, queries: ThumbnailSource, corpus: ThumbnailSource) -> Matches:
        """Find the near duplicates of each image of a set in another one.

        Memory is limited to blocks of images, and does not depend on the size of the sets.

        Args:
            queries: uint8 (m, side, side).
            corpus: uint8 (n, side, side), the larger set.

        Returns:
            At most `MAX_CANDIDATES` for each query.
        """
        found = []
        for first in range(0, len(queries), _QUERY_BLOCK):
            block = queries[first : first + _QUERY_BLOCK]
            query, position = self._candidates(block, corpus)
            for start in range(0, len(query), _VERIFY_BLOCK):
                part = slice(start, start + _VERIFY_BLOCK)
                one, other = block[query[part]], corpus[position[part]]
                similarity, size = self.compare(one, other)
                is_match = similarity >= np.where(size >= _WHOLE_SIZE, MIN_WHOLE_SIMILARITY, MIN_CUT_SIMILARITY)
                is_match &= np.maximum(measure_detail(one), measure_detail(other)) >= MIN_DETAIL
                found.append((query[part][is_match] + first, position[part][is_match], similarity[is_match]))
        if not found:
            return Matches(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        return Matches(*(np.concatenate(columns) for columns in zip(*found, strict=True)))

    def compare(self, first: Thumbnails, second: Thumbnails) -> tuple[FloatArray, FloatArray]:
        """Compare pairs of images in detail.

        Args:
            first: uint8 (n, side, side).
            second: uint8 (n, side, side).

        Returns:
            Similarity of each pair after alignment, and size of the window that one shows of the other, (n,).
        """
        one, other = first.astype(np.float64), second.astype(np.float64)
        turned = {False: one, True: one[..., ::-1]}
        similarities = [
            _dot(
                self._describe(turned[variant.is_mirrored], WHOLE if variant.cuts_second else variant.window),
                self._describe(other, variant.window if variant.cuts_second else WHOLE),
            )
            for variant in _VARIANTS
        ]
        order = np.argsort(similarities, axis=0)
        tried = [self._compare_variants(one, other, order[-rank]) for rank in range(1, _TRIED_VARIANTS + 1)]
        scores, sizes = (np.stack(columns) for columns in zip(*tried, strict=True))
        best = scores.argmax(0), np.arange(len(one))
        return scores[best], sizes[best]

    def _compare_variants(self, one: FloatArray, other: FloatArray, chosen: Indices) -> tuple[FloatArray, FloatArray]:
        """Align each pair, starting from a variant; see `compare`."""
        variants = [_VARIANTS[index] for index in chosen]
        windows = np.array([variant.window for variant in variants]).reshape(-1, 3)
        mirrored = np.array([variant.is_mirrored for variant in variants], np.bool_)[:, None, None]
        cuts_second = np.array([variant.cuts_second for variant in variants], np.bool_)[:, None, None]
        one = np.where(mirrored, one[..., ::-1], one)
        cut, whole = np.where(cuts_second, other, one), np.where(cuts_second, one, other)
        target = self._fine.describe(cut_windows(whole, np.array([WHOLE]), _SIDE))
        aligned = align_windows(cut, whole, windows, _SIDE)
        before, after = (
            _dot(self._fine.describe(cut_windows(cut, guess, _SIDE)), target) for guess in (windows, aligned)
        )
        return np.maximum(before, after), np.where(before >= after, windows[:, 0], aligned[:, 0])

    def _describe(self, images: FloatArray, window: tuple[float, float, float]) -> npt.NDArray[np.float32]:
        return self._coarse.describe(cut_windows(images, np.array([window]), _CANDIDATE_SIDE))

    def _candidates(self, queries: Thumbnails, corpus: ThumbnailSource) -> tuple[Indices, Indices]:
        """Return the most similar images of the corpus for each query, as pairs of indices."""
        images = queries.astype(np.float64)
        turned = (images, images[..., ::-1])
        described = [[self._describe(image, window) for window in WINDOWS] for image in turned]
        is_flat = measure_detail(queries) < MIN_DETAIL_OF_COPY
        kept = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        for first in range(0, len(corpus), _CORPUS_BLOCK):
            block = corpus[first : first + _CORPUS_BLOCK]
            others = [self._describe(block.astype(np.float64), window) for window in WINDOWS]
            similarity = np.full((len(queries), len(block)), -1.0, np.float32)
            product = np.empty_like(similarity)
            for vectors in described:
                for vector in vectors:
                    np.maximum(similarity, np.matmul(vector, others[0].T, out=product), out=similarity)
                for other in others[1:]:
                    np.maximum(similarity, np.matmul(vectors[0], other.T, out=product), out=similarity)
            similarity[is_flat] = -1.0
            similarity[:, measure_detail(block) < MIN_DETAIL_OF_COPY] = -1.0
            query, position = np.nonzero(similarity >= MIN_CANDIDATE_SIMILARITY)
            found = (query, position + first, similarity[query, position])
            kept = _keep_best(*(np.concatenate([kept[field], found[field]]) for field in range(3)))
        return kept[0], kept[1]


def measure_detail(thumbnails: Thumbnails) -> FloatArray:
    """Measure the details of images, without what is one color or a gradient.

    Args:
        thumbnails: uint8 (n, side, side).

    Returns:
        Standard deviation of the gray values without the lowest frequencies, (n,); 0 if they are most of the image,
        such as a horizon.
    """
    basis = cosine_basis(thumbnails.shape[1])
    details = [np.zeros(0)]
    for first in range(0, len(thumbnails), _CORPUS_BLOCK):
        spectrum = basis @ thumbnails[first : first + _CORPUS_BLOCK].astype(np.float64) @ basis.T
        spectrum[:, 0, 0] = 0.0
        total = np.sqrt((spectrum**2).mean((1, 2)))
        spectrum[:, :3, :3] = 0.0
        detail = np.sqrt((spectrum**2).mean((1, 2)))
        details.append(np.where(detail >= _MIN_DETAIL_SHARE * total, detail, 0.0))
    return np.concatenate(details)


def _dot(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> FloatArray:
    return np.asarray(np.einsum("ij,ij->i", first, second), np.float64)


def _keep_best(
    query: Indices, position: Indices, similarity: npt.NDArray[np.float32]
) -> tuple[Indices, Indices, npt.NDArray[np.float32]]:
    """Keep the most similar images of each query; of equal ones, the first."""
    order = np.lexsort((position, -similarity, query))
    query, position, similarity = query[order], position[order], similarity[order]
    first = np.concatenate([[True], query[1:] != query[:-1]]) if len(query) else np.zeros(0, np.bool_)
    starts = np.flatnonzero(first)
    rank = np.arange(len(query)) - np.repeat(starts, np.diff([*starts, len(query)]))
    keep = rank < MAX_CANDIDATES
    return query[keep], position[keep], similarity[keep]
