"""What leaves the process: its series, each with the labels of its job."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class Page(CollectorRegistry):
    """Reads another registry anew each time, and puts the labels of the job on every series.

    Done here and by nobody else: without a join and without a rule of relabelling, on a laptop as in a cluster.
    """

    def __init__(
        self,
        source: Callable[[], Collector],
        labels: Callable[[], Mapping[str, str]],
        only: Collection[str] = (),
    ) -> None:
        """Show what a registry holds.

        Args:
            source: Gives the registry; another one once another job has begun.
            labels: Gives the labels of the job.
            only: Names of the families that are shown; empty for all.
        """
        super().__init__()
        self._source, self._labels, self._only = source, labels, frozenset(only)

    def collect(self) -> Iterable[Metric]:
        """Give all families with their series."""
        return self._collect()

    def _collect(self) -> Iterator[Metric]:
        labels = self._labels()
        for family in self._source().collect():
            if self._only and family.name not in self._only:
                continue
            # A family without a series says nothing, and would stand in a Pushgateway without a meaning.
            if family.samples:
                family.samples = [sample._replace(labels={**labels, **sample.labels}) for sample in family.samples]
                yield family
