"""Computes the features of one split: each node computes every n-th unit and reads the others from storage."""

import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from topwork.errors import Stopped, UnavailableError
from topwork.progress import Tracker
from topwork.spec.digest import digest_of
from topwork.training.feature_cache.chunks import FeatureChunks
from topwork.training.feature_cache.extractor import FeatureExtractor
from topwork.training.feature_cache.request import FeatureRequest, SplitViews
from topwork.training.feature_cache.units import FeatureUnits

# Several nodes report their progress to each other after this time, or after a batch that takes longer.
ROUND_SECONDS = 1.0
# Time between two reports of a node that has computed its units and waits for others.
IDLE_SECONDS = 0.1
# Units that a node reads at the same time.
PARALLEL_READS = 4

Array = npt.NDArray[Any]
# Numbers of a unit and of one of its batches.
UnitBatch = tuple[int, int]


class SplitExtraction:
    """Computes the features of one split, batch by batch.

    Which units a node computes depends only on its index and on the number of nodes. In rounds, all nodes report which
    units they have stored, and whether they were stopped: they stop together, and none of them waits for another one
    that has failed, because the report then fails, too.
    """

    def __init__(
        self,
        request: FeatureRequest,
        part: SplitViews,
        extractor: FeatureExtractor,
        units: FeatureUnits,
        chunks: FeatureChunks,
    ) -> None:
        """Prepare the extraction.

        Args:
            request: The features to compute.
            part: The split.
            extractor: Computes the features.
            units: How its features are divided.
            chunks: The stored units.
        """
        self._request, self._part, self._extractor, self._units, self._chunks = request, part, extractor, units, chunks
        self._workspace = request.context.workspace
        self._nodes = self._workspace.nodes
        self._own = range(self._nodes.index, units.count, self._nodes.count)
        # Units of this node that others may read, and its unfinished unit with the number of its computed rows.
        self._found: list[int] = []
        self._announced = 0
        self._unfinished: tuple[int, int] | None = None

    def fill(self, values: Array, *, store: bool) -> None:
        """Read the stored features and compute the remaining ones.

        Args:
            values: Array to fill, (views * images, *features).
            store: Whether to store the features that are computed. Several nodes must.

        Raises:
            Stopped: If a stop was requested on any node.
            UnavailableError: If features cannot be stored for too long, or those of another node cannot be read.
        """
        with (
            closing(self._compute(values, store)) as steps,
            _PeerUnits(self._units, self._chunks, values) as peer_units,
        ):
            is_complete = False
            while not is_complete:
                is_computing = self._run_round(steps)
                is_complete = self._meet(peer_units, values, is_computing=is_computing, store=store)
                if not is_computing and not is_complete:
                    self._chunks.retry()
                    peer_units.wait(IDLE_SECONDS)

    def _compute(self, values: Array, store: bool) -> Generator[None]:
        """Read what is stored of the units of this node, then compute the rest; pause after each unit and batch."""
        missing: list[UnitBatch] = []
        for unit in self._own:
            count = self._read_stored(unit, values)
            missing += [(unit, batch) for batch in self._units.batches_of(unit)[count:]]
            yield
        with self._workspace.track(f"features: {self._part.name}", len(missing)) as tracker:
            for part in self._divide(missing, values, tracker):
                for _ in self._extract(part, values, store):
                    yield
                    tracker.advance()

    def _divide(self, missing: list[UnitBatch], values: Array, tracker: Tracker) -> Iterator[list[UnitBatch]]:
        """Yield the missing batches in the parts in which they are computed.

        Other runs may compute the same shared features at this moment. Each begins with another unit, and looks before
        each unit whether it has been stored in the meantime.
        """
        if not self._request.context.plan.feature_cache.shared or self._nodes.count > 1:
            yield missing
            return
        units = list(dict.fromkeys(unit for unit, _ in missing))
        first = int(digest_of(self._request.context.job.run)[:8], 16) % max(1, len(units))
        for unit in units[first:] + units[:first]:
            batches = [(unit, batch) for batch in self._units.batches_of(unit)]
            if self._fill_unit(unit, self._chunks.read(unit, values.shape[1:], values.dtype), values) == len(batches):
                tracker.advance(len(batches))
            else:
                yield batches

    def _extract(self, missing: list[UnitBatch], values: Array, store: bool) -> Iterator[None]:
        """Compute and store batches; pause after each of them."""
        extracted = self._request.extract(self._part, self._extractor, [batch for _, batch in missing])
        for (unit, batch), features in zip(missing, extracted, strict=True):
            rows, unit_rows = self._units.rows_of_batch(batch), self._units.rows_of(unit)
            limit = np.finfo(values.dtype).max
            values[rows.start : rows.stop] = np.clip(features[: len(rows)], -limit, limit)
            self._unfinished = (unit, rows.stop - unit_rows.start)
            if rows.stop == unit_rows.stop:
                self._unfinished = None
                if store:  # filled rows do not change
                    self._chunks.write(unit, values[unit_rows.start : unit_rows.stop])
            yield

    def _read_stored(self, unit: int, values: Array) -> int:
        """Read a stored unit, or its first batches, and return the number of its batches that are complete."""
        return self._fill_unit(unit, self._chunks.find(unit, values.shape[1:], values.dtype), values)

    def _fill_unit(self, unit: int, stored: Array | None, values: Array) -> int:
        rows = self._units.rows_of(unit)
        if stored is None or len(stored) > len(rows):
            return 0
        values[rows.start : rows.start + len(stored)] = stored
        if len(stored) == len(rows):
            self._found.append(unit)
        end = rows.start + len(stored)
        return sum(self._units.rows_of_batch(batch).stop <= end for batch in self._units.batches_of(unit))

    def _run_round(self, steps: Generator[None]) -> bool:
        """Compute until the nodes report to each other; a single node after each batch. Return whether work is left."""
        end = time.monotonic() + (ROUND_SECONDS if self._nodes.count > 1 else 0.0)
        return any(time.monotonic() >= end or self._workspace.stop.is_set() for _ in steps)

    def _meet(self, peer_units: "_PeerUnits", values: Array, *, is_computing: bool, store: bool) -> bool:
        """Report progress to the other nodes, and start to read what they stored. Return whether all are complete."""
        stored, self._found = [*self._found, *self._chunks.take_stored()], []
        self._announced += len(stored)
        is_shared = self._nodes.count == 1 or self._announced == len(self._own)
        missing = self._units.count - len(self._own) if self._nodes.count > 1 else 0
        reports = self._nodes.gather(
            {
                "stop": self._workspace.stop.is_set(),
                "stored": stored,
                "complete": not is_computing and is_shared and peer_units.count_read() == missing,
            }
        )
        if any(report["stop"] for report in reports):
            self._stop(values, store)
        for index, report in enumerate(reports):
            if index != self._nodes.index:
                peer_units.start_reading(index, report["stored"])
        return all(report["complete"] for report in reports)

    def _stop(self, values: Array, store: bool) -> None:
        # Another run may have stored the whole unit of shared features.
        if self._unfinished and store and not self._request.context.plan.feature_cache.shared:
            unit, count = self._unfinished
            start = self._units.rows_of(unit).start
            self._chunks.write(unit, values[start : start + count])
        raise Stopped("Stopped while computing features of the frozen layers. Start the same job again to resume.")


class _PeerUnits:
    """Reads the units that other nodes stored, in background threads."""

    def __init__(self, units: FeatureUnits, chunks: FeatureChunks, values: Array) -> None:
        self._units, self._chunks, self._values = units, chunks, values
        self._threads = ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix="features-read")
        self._reads: list[Future[None]] = []

    def __enter__(self) -> "_PeerUnits":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def start_reading(self, node: int, units: list[int]) -> None:
        self._reads += [self._threads.submit(self._read, node, unit) for unit in units]

    def count_read(self) -> int:
        """Return the number of units that were read; raise the error of a failed read."""
        return sum(read.result() is None for read in self._reads if read.done())

    def wait(self, seconds: float) -> None:
        """Wait until a unit was read, or for some time."""
        running = [read for read in self._reads if not read.done()]
        if running:
            wait(running, seconds, "FIRST_COMPLETED")
        else:
            time.sleep(seconds)

    def _read(self, node: int, unit: int) -> None:
        rows = self._units.rows_of(unit)
        stored = self._chunks.read(unit, self._values.shape[1:], self._values.dtype)
        if stored is None or len(stored) != len(rows):
            raise UnavailableError(
                f"Features that node {node} stored (unit {unit}) are missing from storage, or are damaged. Start the "
                "same job again: features that are complete are not computed again."
            )
        self._values[rows.start : rows.stop] = stored
