"""Counting, and how Prometheus reads it.

Code that counts asks for its `Count` or `Histogram` once, when what it serves is prepared in the worker, and keeps it:

    refused = metrics.counter("gateway_refusals_total", pipeline="mx", cause="policy", phase="rcpt")
    refused.add()

`bind` says which row of the shared counters is this process's. Before it, and in a process that has none, the numbers
are in a row of the process's own. Sums of seconds are kept in whole microseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

from gateway.observe.counters import Count, CounterMap, CounterRow, Kind
from gateway.observe.metric_table import LABELS, METRICS, Metric, Type

__all__ = ["LABELS", "METRICS", "Count", "Counters", "Histogram", "Metric", "Type", "bind", "counter", "counters",
           "exposition", "gauge", "histogram", "over_all", "total"]  # fmt: skip

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
DYNAMIC: Final = "(dynamic)"
"""The label `server` of all servers that no configuration names."""

_MICROSECONDS: Final = 1_000_000
_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_HELP_ESCAPES: Final = str.maketrans({"\\": r"\\", "\n": r"\n"})


class Histogram:
    """How long something takes: a count a bucket, and the sum."""

    __slots__ = ("_bounds", "_cells", "_places", "_sum")

    def __init__(self, bounds: tuple[float, ...], buckets: list[Count], total: Count) -> None:
        """`buckets` has one more than `bounds`: what is above them all."""
        self._bounds = bounds
        self._cells, self._sum = total.cell
        self._places = [bucket.cell[1] for bucket in buckets]

    def observe(self, seconds: float) -> None:
        """It took so long."""
        cells = self._cells
        cells[self._places[bisect_left(self._bounds, seconds)]] += 1
        cells[self._sum] += int(seconds * 1_000_000 + 0.5)

    @property
    def places(self) -> tuple[memoryview[int], list[int], int]:
        """The numbers that it is among, where the buckets are, where the sum, for whoever counts more in one go."""
        return self._cells, self._places, self._sum

    @property
    def count(self) -> int:
        """How often it was observed."""
        return sum(self._cells[place] for place in self._places)

    @property
    def sum(self) -> float:
        """All that was observed, in seconds."""
        return self._cells[self._sum] / _MICROSECONDS


class _Place:
    """Where this process counts."""

    def __init__(self) -> None:
        self.map: CounterMap | None = None
        self.row = CounterMap.private().row(0)
        self.counts: dict[tuple[object, ...], Count] = {}
        self.histograms: dict[tuple[object, ...], Histogram] = {}


_place: Final = _Place()


def bind(row: CounterRow, map: CounterMap | None) -> None:
    """Count in this row from now on, and know what the processes of `map` counted.

    Call it before anything asks for its counts: those that were got earlier stay where they were.
    """
    _place.row, _place.map = row, map
    _place.counts.clear()
    _place.histograms.clear()


def counter(name: str, **labels: str) -> Count:
    """The number of a counter. Raises KeyError, TypeError or ValueError for what METRICS does not have."""
    key = (name, *labels.items())
    found = _place.counts.get(key)
    if found is None:
        found = _place.counts[key] = _place.row.slot(_declared(name, "counter", labels))
    return found


def counters(name: str, *varying: str, **labels: str) -> Counters:
    """The numbers of a counter by the values of those labels that are known only when it occurs. Raises as `counter`.

    refusals = metrics.counters("gateway_refusals_total", "cause", "phase", pipeline="mx")
    refusals["policy", "rcpt"].add()
    """
    _declared(name, "counter", {**dict.fromkeys(varying, ""), **labels})
    return Counters(name, varying, labels)


class Counters(dict[tuple[str, ...], Count]):
    """Numbers of one counter, each made when it is first asked for; see `counters`."""

    __slots__ = ("_labels", "_name", "_varying")

    def __init__(self, name: str, varying: tuple[str, ...], labels: dict[str, str]) -> None:
        super().__init__()
        self._name, self._varying, self._labels = name, varying, labels

    def __missing__(self, values: tuple[str, ...]) -> Count:
        labels = {**dict(zip(self._varying, values, strict=True)), **self._labels}
        count = self[values] = counter(self._name, **labels)
        return count


def gauge(name: str, **labels: str) -> Count:
    """The number of a gauge, of this process. Raises as `counter`."""
    key = (name, *labels.items())
    found = _place.counts.get(key)
    if found is None:
        sample = _declared(name, "gauge", labels)
        kind: Kind = "m" if METRICS[name].highest else "g"
        found = _place.counts[key] = _place.row.slot(sample, kind)
    return found


def histogram(name: str, **labels: str) -> Histogram:
    """A histogram. Raises as `counter`."""
    key = (name, *labels.items())
    found = _place.histograms.get(key)
    if found is None:
        _declared(name, "histogram", labels)
        row, bounds = _place.row, METRICS[name].bounds
        labels = {label: labels[label] for label in METRICS[name].labels}
        buckets = [row.slot(_sample(f"{name}_bucket", {**labels, "le": le})) for le in _ends(bounds)]
        found = Histogram(bounds, buckets, row.slot(_sample(f"{name}_sum", labels)))
        _place.histograms[key] = found
    return found


def total(name: str, **labels: str) -> int:
    """The number of a counter or gauge over all processes; without labels that of all its series together.

    Raises as `counter`.
    """
    if not labels and METRICS[name].labels:
        start, totals = name + "{", _all_totals()
        return sum(value for sample, value in totals.items() if sample.startswith(start))
    sample = _declared(name, METRICS[name].type, labels)
    if _place.map is not None:
        return _place.map.total(sample)
    count = _place.row.find(sample)
    return count.value if count is not None else 0


def _all_totals() -> dict[str, int]:
    if _place.map is not None:
        return _place.map.totals()
    series = [sample for sample, _ in _place.row.series()]
    return dict(zip(series, _place.row.values(), strict=True))


def over_all(name: str, **labels: str) -> Callable[[], int] | None:
    """`total` for whoever asks often; None where this process counts alone. Raises as `counter`."""
    sample = _declared(name, METRICS[name].type, labels)
    return None if _place.map is None else partial(_place.map.total, sample)


def _declared(name: str, type: Type, labels: dict[str, str]) -> str:
    """The sample's text; the labels in the order of the table."""
    metric = METRICS[name]
    if metric.type != type:
        raise TypeError(f"{name} is a {metric.type}")
    if labels.keys() != set(metric.labels):
        raise ValueError(f"{name} has the labels {', '.join(metric.labels) or '(none)'}, not {', '.join(labels)}")
    return _sample(name, {label: labels[label] for label in metric.labels})


def _sample(name: str, labels: Mapping[str, str]) -> str:
    if not labels:
        return name
    pairs = [f'{label}="{value.translate(_ESCAPES)}"' for label, value in labels.items()]
    return f"{name}{{{','.join(pairs)}}}"


def _ends(bounds: tuple[float, ...]) -> list[str]:
    """The label `le` of each bucket."""
    return [*(repr(bound) for bound in bounds), "+Inf"]


# -- what Prometheus reads -------------------------------------------------------------------------------------


def exposition(totals: Mapping[str, int]) -> str:
    """All metrics of the table that have series or are there from the start, from `CounterMap.totals()`, in Prometheus'
    text format 0.0.4."""
    families = {name: dict.fromkeys(_from_the_start(name, metric), 0) for name, metric in METRICS.items()}
    for sample, value in totals.items():
        families.setdefault(sample.partition("{")[0], {})[sample] = value
    lines: list[str] = []
    for name, metric in METRICS.items():
        if metric.type == "histogram":
            samples = list(_histogram_lines(name, metric, families))
        else:
            samples = [f"{sample} {value}" for sample, value in sorted(families.get(name, {}).items())]
        if samples:
            lines += [f"# HELP {name} {metric.help.translate(_HELP_ESCAPES)}", f"# TYPE {name} {metric.type}", *samples]
    return "".join(f"{line}\n" for line in lines)


def _from_the_start(name: str, metric: Metric) -> list[str]:
    """Counters that are there before they were counted: those without labels, and what `Metric.always` says."""
    if metric.type == "counter" and not metric.labels:
        return [name]
    return [_sample(name, {metric.labels[0]: value}) for value in metric.always]


def _histogram_lines(name: str, metric: Metric, families: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Buckets that count all below their end, the sum in seconds, the number."""
    buckets = families.get(f"{name}_bucket", {})
    for sample, microseconds in sorted(families.get(f"{name}_sum", {}).items()):
        labels = sample.removeprefix(f"{name}_sum")
        inner = labels[1:-1] + "," if labels else ""
        count = 0
        for end in _ends(metric.bounds):
            bucket = f'{name}_bucket{{{inner}le="{end}"}}'
            count += buckets.get(bucket, 0)
            yield f"{bucket} {count}"
        yield f"{sample} {microseconds / _MICROSECONDS!r}"
        yield f"{name}_count{labels} {count}"
