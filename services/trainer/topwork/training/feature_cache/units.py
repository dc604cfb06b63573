"""Units of cached features: whole batches that one node computes and stores, and that a resumed run finds again."""

from dataclasses import dataclass

# Largest unit, in images and bytes: a process holds a few units in memory while it stores and reads them.
MAX_UNIT_IMAGES = 1024
MAX_UNIT_BYTES = 64 * 2**20
# A split has at least this many units, if it has as many batches, so that all nodes have something to compute.
MIN_UNITS = 16


@dataclass(frozen=True)
class FeatureUnits:
    """How the features of a split are divided into units. Rows are those of all views: row v * size + i is view v of i.

    The division does not depend on the number of nodes: whatever is stored can be used by any number of them.

    Attributes:
        size: Number of images.
        views: Number of views of each image.
        batch_size: Global batch size. Each view begins with a new batch, so its last batch may be smaller.
        batches_per_unit: Number of batches of a unit; the last unit may have fewer.
    """

    size: int
    views: int
    batch_size: int
    batches_per_unit: int

    @property
    def batches(self) -> int:
        """Number of batches over all views."""
        return self.views * self._batches_per_view

    @property
    def count(self) -> int:
        """Number of units."""
        return -(-self.batches // self.batches_per_unit)

    def batches_of(self, unit: int) -> range:
        """Return the numbers of the batches of a unit, counted over all views.

        Args:
            unit: Number of the unit, from 0.
        """
        first = unit * self.batches_per_unit
        return range(first, min(first + self.batches_per_unit, self.batches))

    def rows_of_batch(self, batch: int) -> range:
        """Return the rows of a batch, without padding.

        Args:
            batch: Number of the batch.
        """
        view, number = divmod(batch, self._batches_per_view)
        first = number * self.batch_size
        return range(view * self.size + first, view * self.size + min(first + self.batch_size, self.size))

    def rows_of(self, unit: int) -> range:
        """Return the rows of a unit.

        Args:
            unit: Number of the unit.
        """
        batches = self.batches_of(unit)
        return range(self.rows_of_batch(batches[0]).start, self.rows_of_batch(batches[-1]).stop)

    @property
    def _batches_per_view(self) -> int:
        return -(-self.size // self.batch_size)


def divide_into_units(size: int, views: int, batch_size: int, row_bytes: int) -> FeatureUnits:
    """Divide the features of a split into units.

    Args:
        size: Number of images.
        views: Number of views of each image.
        batch_size: Global batch size.
        row_bytes: Size of the features of an image.

    Returns:
        The largest units within the limits; at least one batch each.
    """
    batches = views * -(-size // batch_size)
    images = min(MAX_UNIT_IMAGES, MAX_UNIT_BYTES // row_bytes)
    return FeatureUnits(size, views, batch_size, max(1, min(images // batch_size, -(-batches // MIN_UNITS))))
