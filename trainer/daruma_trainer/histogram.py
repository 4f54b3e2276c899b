"""A histogram in Prometheus' sense that is cheap to feed, for what happens with every push.

The library's own would have to be imported where the process starts, and takes a lock each time.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.core import HistogramMetricFamily


class Histogram:
    """How many values there were up to each bound. One thread observes, any may read."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: ascending; what is above the last has a bucket, too."""
        self._bounds = tuple(float(bound) for bound in bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.total = 0.0
        """Sum of all values."""

    def observe(self, value: float) -> None:
        """Count a value: to the first bound that it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    def family(self, name: str, text: str, labels: Mapping[str, str]) -> "HistogramMetricFamily":
        """Return it as Prometheus' library has it, which is imported here.

        Of a value that is observed meanwhile, in another thread, the sum may not know yet.
        """
        from prometheus_client.core import HistogramMetricFamily

        found = HistogramMetricFamily(name, text, labels=list(labels))
        bounds = [*map(repr, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        found.add_metric(list(labels.values()), buckets, self.total)
        return found
