"""Counts, gauges and histograms that cost next to nothing until somebody reads them. Knows no names.

prometheus_client's own take a lock for each observation. These are plain numbers with one writer each, an event loop
or the engine's thread, and become its families when a registry collects them.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Number:
    """A count that only grows, or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Tally:
    """Observations by upper bound, bounds included; the last count is of those above all of them."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Family:
    """One name's numbers or tallies, by the values of its labels.

    Values of labels are never what users send: each makes a series that stays.
    """

    def __init__(self, metric: tuple[str, str, str], labels: Sequence[str], bounds: Sequence[float] = ()):
        """`metric`: name, kind and help."""
        self.name, self.kind, self.help = metric
        self.labels, self.bounds = tuple(labels), bounds
        self.numbers: dict[tuple[str, ...], Number] = {}
        self.tallies: dict[tuple[str, ...], Tally] = {}

    def number(self, *values: str) -> Number:
        """The count or gauge with these values of the labels."""
        found = self.numbers.get(values)
        if found is None:
            found = self.numbers[values] = Number()
        return found

    def tally(self, *values: str) -> Tally:
        """The histogram with these values of the labels."""
        found = self.tallies.get(values)
        if found is None:
            found = self.tallies[values] = Tally(self.bounds)
        return found

    def read(self, shared: Mapping[str, str]) -> Metric:
        """As prometheus_client has it; `shared` are labels that all of them have."""
        metric = Metric(self.name, self.help, self.kind)
        for values, number in list(self.numbers.items()):
            labels = {**shared, **dict(zip(self.labels, values, strict=True))}
            name = f"{self.name}_total" if self.kind == "counter" else self.name
            metric.add_sample(name, labels, number.value)
        for values, tally in list(self.tallies.items()):
            labels = {**shared, **dict(zip(self.labels, values, strict=True))}
            counts = list(accumulate(tally.counts))  # once, so that buckets and count agree
            for bound, count in zip((*self.bounds, float("inf")), counts, strict=True):
                metric.add_sample(f"{self.name}_bucket", {**labels, "le": _shown(bound)}, count)
            metric.add_sample(f"{self.name}_count", labels, counts[-1])
            metric.add_sample(f"{self.name}_sum", labels, tally.sum)
        return metric


def _shown(bound: float) -> str:
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


class Families(Collector):
    """All families of a process. Asking twice for a name gives the same one.

    Attributes:
        shared: labels of all families that do not say otherwise; may be changed at any time.
        others: whose samples are read with these, under the same names.
    """

    def __init__(self, shared: Mapping[str, str]):
        self.shared = dict(shared)
        self.others: list[Families] = []
        self._found: dict[str, tuple[Family, frozenset[str] | None]] = {}

    def counter(self, name: str, help: str, *labels: str, only: frozenset[str] | None = None) -> Family:
        """`name` is without `_total`. `only`: which of the shared labels it has; None for all."""
        return self._family(Family((name, "counter", help), labels), only)

    def gauge(self, name: str, help: str, *labels: str, only: frozenset[str] | None = None) -> Family:
        """See `counter`."""
        return self._family(Family((name, "gauge", help), labels), only)

    def histogram(
        self,
        name: str,
        help: str,
        bounds: Sequence[float],
        *labels: str,
        only: frozenset[str] | None = None,
    ) -> Family:
        """`bounds` are upper ones, ascending. See `counter`."""
        return self._family(Family((name, "histogram", help), labels, bounds), only)

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        for name in list(self._found):
            metric = self.read(name)
            for other in self.others:
                if name in other._found:
                    metric.samples += other.read(name).samples
            yield metric

    def read(self, name: str) -> Metric:
        """One family, as prometheus_client has it."""
        family, only = self._found[name]
        return family.read({k: v for k, v in self.shared.items() if only is None or k in only})

    def _family(self, family: Family, only: frozenset[str] | None) -> Family:
        return self._found.setdefault(family.name, (family, only))[0]
