"""Metrics of several processes as one: read from any registry, added up, and read like a registry again."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.registry import Collector

from quire.engine.wire import Samples

ADDED = ("counter", "histogram", "summary")
Key = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name and labels


@dataclass(frozen=True, slots=True)
class Fixed(Collector):
    """Samples in the shape of a registry."""

    metrics: list[Samples]

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        for each in self.metrics:
            metric = Metric(each.name, each.help, each.kind)
            for name, labels, value in each.samples:
                metric.add_sample(name, labels, value)
            yield metric


def samples_of(registry: Collector) -> list[Samples]:
    """What a registry says now."""
    return [
        Samples(
            m.name, m.documentation, m.type, [(s.name, dict(s.labels), float(s.value)) for s in m.samples]
        )
        for m in registry.collect()
    ]


def merged(first: Iterable[Samples], others: Iterable[Iterable[Samples]]) -> list[Samples]:
    """Counts and histograms are added up. A gauge is the first one's, if that has it, or else the others' sum."""
    shapes: dict[str, Samples] = {}
    sums: dict[str, dict[Key, float]] = {}
    first = list(first)
    settled = {metric.name for metric in first if metric.kind not in ADDED}
    for process in (first, *others):
        for metric in process:
            if metric.name in settled and process is not first:
                continue
            shapes.setdefault(metric.name, metric)
            found = sums.setdefault(metric.name, {})
            for name, labels, value in metric.samples:
                key = name, tuple(sorted(labels.items()))
                found[key] = found.get(key, 0.0) + value
    return [
        Samples(
            name, shape.help, shape.kind, [(key, dict(labels), v) for (key, labels), v in sums[name].items()]
        )
        for name, shape in shapes.items()
    ]


def kept(metrics: Iterable[Samples]) -> list[Samples]:
    """What remains of a process that is gone: what it counted."""
    return [metric for metric in metrics if metric.kind in ADDED]
