"""Units of cached features: each row is in exactly one of them, and units consist of whole batches."""

from itertools import chain

import pytest

from topwork.training.feature_cache.units import MAX_UNIT_BYTES, divide_into_units


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100, 5000])
@pytest.mark.parametrize("views", [1, 3])
def test_each_row_is_in_one_unit_and_one_batch(size, views):
    units = divide_into_units(size, views, batch_size=8, row_bytes=100)
    assert [*chain.from_iterable(units.rows_of(unit) for unit in range(units.count))] == [*range(size * views)]
    for unit in range(units.count):
        batches = [units.rows_of_batch(batch) for batch in units.batches_of(unit)]
        assert [*chain.from_iterable(batches)] == [*units.rows_of(unit)]
        assert all(0 < len(rows) <= 8 for rows in batches)


@pytest.mark.parametrize(
    ("size", "batch_size", "row_bytes", "images"),
    [
        (100_000, 32, 4096, 1024),
        (100_000, 32, MAX_UNIT_BYTES // 100, 96),
        (100_000, 4096, 4096, 4096),
        (2_000, 32, 4096, 128),
        (100, 32, 4096, 32),
        (100, 32, 2 * MAX_UNIT_BYTES, 32),
    ],
    ids=["largest", "large features", "large batch", "few images", "very few images", "very large features"],
)
def test_units_are_limited_and_suffice_for_several_nodes(size, batch_size, row_bytes, images):
    units = divide_into_units(size, 1, batch_size, row_bytes)
    assert units.batches_per_unit * batch_size == images
