"""Metrics: what is declared, what code asks for, what Prometheus reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.observe import metrics
from gateway.observe.counters import LOST, CounterMap
from gateway.observe.metrics import LABELS, METRICS
from gateway.pipeline.meter import Meter
from gateway.session import Listener, Session

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def shared() -> Iterator[CounterMap]:
    """Counters of two processes; the test is the first."""
    shared = CounterMap.create(2)
    metrics.bind(shared.row(0), shared)
    yield shared
    metrics.bind(CounterMap.private().row(0), None)


def parsed(shared: CounterMap) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What Prometheus' own parser reads; it raises for what is no such text."""
    families = text_string_to_metric_families(metrics.exposition(shared.totals()))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value for one in families for sample in one.samples
    }


def test_counters_and_gauges(shared: CounterMap) -> None:
    hostile = 'a"b\\c\nd{e}=,'
    metrics.counter("gateway_refusals_total", pipeline="mx", cause=hostile, phase="rcpt").add(3)
    metrics.counter("gateway_refusals_total", phase="rcpt", pipeline="mx", cause=hostile).add()  # any order
    metrics.gauge("gateway_workers").set(1)
    metrics.gauge("gateway_generation").set(4)
    metrics.bind(shared.row(1), shared)
    metrics.gauge("gateway_workers").set(1)
    metrics.gauge("gateway_generation").set(3)
    values = parsed(shared)
    labels = {"pipeline": "mx", "cause": hostile, "phase": "rcpt"}
    assert values["gateway_refusals_total", frozenset(labels.items())] == 4
    assert values["gateway_workers", frozenset()] == 2
    assert values["gateway_generation", frozenset()] == 4
    assert metrics.total("gateway_refusals_total", **labels) == metrics.total("gateway_refusals_total") == 4
    over_all = metrics.over_all("gateway_workers")
    assert over_all is not None and over_all() == 2


def test_alone(shared: CounterMap) -> None:
    metrics.bind(CounterMap.private().row(0), None)
    assert metrics.over_all("gateway_workers") is None
    assert metrics.total("gateway_workers") == 0
    metrics.gauge("gateway_workers").set(1)
    metrics.counters("gateway_reloads_total", "result")["done",].add(2)
    assert (metrics.total("gateway_workers"), metrics.total("gateway_reloads_total")) == (1, 2)
    assert shared.totals() == {}


def test_histogram(shared: CounterMap) -> None:
    name = "gateway_store_seconds"
    observed = metrics.histogram(name, store="lmdb", operation="hit")
    for seconds in (0.0001, 0.00011, 0.004, 0.2, 99.0):  # the first is at the very end of its bucket
        observed.observe(seconds)
    assert metrics.histogram(name, operation="hit", store="lmdb") is not None
    labels = {"store": "lmdb", "operation": "hit"}
    values = parsed(shared)
    counts = [
        values[f"{name}_bucket", frozenset({**labels, "le": le}.items())]
        for le in ("0.0001", "0.00025", "0.0025", "0.005", "0.1", "0.5", "5.0", "+Inf")
    ]
    assert counts == [1, 2, 2, 3, 3, 4, 4, 5]
    assert values[f"{name}_count", frozenset(labels.items())] == observed.count == 5
    assert values[f"{name}_sum", frozenset(labels.items())] == observed.sum == pytest.approx(99.20421)


def test_sums_of_what_takes_microseconds_are_right_on_average(shared: CounterMap) -> None:
    meter = Meter("mx", "quick", "mail")
    observed = metrics.histogram("gateway_stage_seconds", pipeline="mx", stage="quick", phase="mail")
    session = Session("S", "mx", Listener("smtp://:25"), ("192.0.2.1", 1), ("192.0.2.2", 25), 0.0)
    for _ in range(10):
        for tenth in range(10):
            meter.answered(session, type(None), True, (2 + tenth / 10) / 1e6)
            observed.observe((2 + tenth / 10) / 1e6)
    assert observed.count == 200
    assert observed.sum == pytest.approx(200 * 2.45e-6, rel=0.03)


def test_numbers_by_labels_that_occur(shared: CounterMap) -> None:
    found = metrics.counters("gateway_refusals_total", "cause", "phase", pipeline="mx")
    found["policy", "rcpt"].add()
    found["policy", "rcpt"].add()
    found["policy", "mail"].add()
    samples = {name: value for name, value in shared.totals().items() if name != LOST}
    assert samples == {
        'gateway_refusals_total{pipeline="mx",cause="policy",phase="rcpt"}': 2,
        'gateway_refusals_total{pipeline="mx",cause="policy",phase="mail"}': 1,
    }


def test_what_is_not_declared() -> None:
    with pytest.raises(KeyError):
        metrics.counter("gateway_x_total")
    with pytest.raises(TypeError, match="is a gauge"):
        metrics.counter("gateway_workers")
    with pytest.raises(ValueError, match="has the labels result"):
        metrics.counter("gateway_reloads_total", how="x")
    with pytest.raises(ValueError, match="has the labels"):
        metrics.counters("gateway_refusals_total", "cause", pipeline="mx")


@pytest.mark.parametrize("name", METRICS)
def test_names_are_as_prometheus_wants_them(name: str) -> None:
    """What promtool's linter complains of, https://prometheus.io/docs/practices/naming/ ."""
    metric = METRICS[name]
    assert re.fullmatch(r"gateway(_[a-z]+)+", name)
    assert re.fullmatch("[A-Z0-9].*[.]", metric.help)
    assert name.endswith("_total") == (metric.type == "counter")
    words = name.split("_")
    assert not {"counter", "gauge", "histogram", "summary", "metric"} & set(words)
    assert words[-1] not in ("count", "sum", "bucket")
    small = {"milliseconds", "ms", "minutes", "hours", "days", "kilobytes", "kb", "bits", "percent", "octets"}
    assert not small & set(words)
    units = {"seconds", "bytes"} & set(words)
    if units:  # the last word, or before _total
        assert words[-2 if metric.type == "counter" else -1] in units
    if metric.type == "histogram":
        assert words[-1] == "seconds" and list(metric.bounds) == sorted(set(metric.bounds)) and metric.bounds[0] > 0
    else:
        assert not metric.bounds
    assert metric.type == "gauge" or not metric.highest
    assert words[-1] != "info" or metric.type == "gauge"
    for label in metric.labels:
        assert re.fullmatch("[a-z]+", label) and label in LABELS
        assert label not in ("le", "quantile", "job", "instance")


def test_labels_are_used() -> None:
    assert set(LABELS) == {label for metric in METRICS.values() for label in metric.labels}


def test_what_alerts_count_is_there_from_the_start(shared: CounterMap) -> None:
    """`increase` of a series that begins at 1 is 0: the first failed reload would wake nobody."""
    values = parsed(shared)
    assert values["gateway_log_lines_lost_total", frozenset()] == 0
    metrics.counter("gateway_reloads_total", result="failed").add()
    reloads = {labels: value for (name, labels), value in parsed(shared).items() if name == "gateway_reloads_total"}
    assert reloads == {frozenset({("result", "failed")}): 1, frozenset({("result", "done")}): 0}
    for metric in METRICS.values():
        assert not metric.always or (metric.type == "counter" and len(metric.labels) == 1)
        told = " ".join([metric.help, *(LABELS[label] for label in metric.labels)])
        assert all(f"`{value}`" in told for value in metric.always)


def test_a_full_row_is_seen(shared: CounterMap) -> None:
    assert LOST in METRICS
    metrics.counter(LOST).add(2)
    assert parsed(shared)[LOST, frozenset()] == 2


# -- the source --------------------------------------------------------------------------------------------------

ASKED = {"counter": "counter", "counters": "counter", "gauge": "gauge", "histogram": "histogram"}


def _asked() -> Iterator[tuple[str, ast.Call, dict[str, str]]]:
    """Every `metrics.counter(...)` and the like in the source, where it stands, and the module's constants."""
    for path in sorted([*ROOT.glob("gateway/**/*.py"), *ROOT.glob("stages/**/*.py")]):
        text = path.read_text()
        if "metrics" not in text or path.name == "metrics.py":
            continue
        tree = ast.parse(text)
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {*ASKED, "total", "over_all"}
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "metrics"
            ):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node, constants


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return constants[node.id]
    assert isinstance(node, ast.Constant) and isinstance(node.value, str), "a name that is written out"
    return node.value


def test_the_source_asks_for_what_is_declared() -> None:
    seen = set()
    for place, call, constants in _asked():
        assert isinstance(call.func, ast.Attribute)
        asked = call.func.attr
        name, *varying = (_text(one, constants) for one in call.args)
        metric = METRICS.get(name)
        assert metric is not None, f"{place}: {name}"
        seen.add(name)
        assert metric.type == ASKED.get(asked, metric.type), place
        if any(keyword.arg is None for keyword in call.keywords):
            continue  # **labels: held against the table when they are asked for
        labels = {*varying, *(str(keyword.arg) for keyword in call.keywords)}
        assert labels == set(metric.labels) or (asked == "total" and not labels), f"{place}: {name} {labels}"
    assert len(seen) > 20
