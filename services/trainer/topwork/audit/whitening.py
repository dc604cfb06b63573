"""Whitening: what distinguishes an image from the others of its dataset, as a vector.

Images of a dataset share much: the frame of a solar cell, the black background of a digit. Whitening divides by the
covariance of the dataset, so that common structure counts little and details of a single image count much.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from topwork.audit.alignment import FloatArray, normalize

# A small dataset says little about its covariance, which is therefore mixed with that of natural images: as if so many
# images had been added.
_PRIOR_IMAGES = 200


@dataclass(frozen=True)
class Whitening:
    """Mean and projection of normalized thumbnails.

    Attributes:
        mean: (pixels,).
        projection: (pixels, pixels); its product with its transpose is the inverse of the covariance.
    """

    mean: FloatArray
    projection: FloatArray

    @classmethod
    def fit(cls, images: FloatArray, noise: float) -> "Whitening":
        """Estimate mean and covariance.

        Args:
            images: Thumbnails of the dataset and their mirror images, (n, side, side).
            noise: Variance of noise, relative to the contrast of an image: details below it do not count.
        """
        side = images.shape[1]
        samples = normalize(images)
        total = len(samples) + _PRIOR_IMAGES
        mean = samples.sum(0) / total
        covariance = (samples.T @ samples + _PRIOR_IMAGES * _natural_covariance(side)) / total - np.outer(mean, mean)
        return cls(mean, np.linalg.inv(np.linalg.cholesky(covariance + noise * np.eye(side**2))).T)

    def describe(self, images: FloatArray) -> npt.NDArray[np.float32]:
        """Return vectors of length 1, whose product is the similarity of two images.

        Args:
            images: (n, side, side).

        Returns:
            float32 (n, side * side).
        """
        vectors = (normalize(images) - self.mean) @ self.projection
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(lengths, 1e-6), np.float32)


def _natural_covariance(side: int) -> FloatArray:
    """Return the covariance of natural images, whose power decreases with the square of the frequency."""
    basis = cosine_basis(side)
    frequency = np.hypot(*np.meshgrid(np.arange(side), np.arange(side)))
    power = 1.0 / np.maximum(frequency, 1.0) ** 2
    power[0, 0] = 0.0
    power *= side**2 / power.sum()
    vectors = np.kron(basis, basis)
    return np.asarray((vectors.T * power.ravel()) @ vectors)


def cosine_basis(side: int) -> FloatArray:
    """Return the orthonormal basis of the discrete cosine transform, (frequency, pixel)."""
    angles = np.pi * np.arange(side)[:, None] * (np.arange(side) + 0.5) / side
    return np.asarray(np.cos(angles) * np.where(np.arange(side)[:, None] == 0, np.sqrt(1 / side), np.sqrt(2 / side)))
