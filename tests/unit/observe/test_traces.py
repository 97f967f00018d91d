"""Spans of a session: what they say, when they begin and end, and what becomes of them when nobody takes them."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import ValidationError
from structlog.testing import capture_logs

from gateway.config import process
from gateway.config.process import Process
from gateway.observe import spans, traces
from gateway.observe.spans import Traces
from gateway.observe.traces import TracedSession, TraceSettings
from gateway.protocol.smtp import Reply
from gateway.service.places import trace_settings
from gateway.session import Listener, Recipient, Seen, Session, Transaction

pytestmark = pytest.mark.anyio

ALL = TraceSettings("http://127.0.0.1:9/v1/traces", 1.0)


def session(kind: type[Session] = TracedSession) -> Session:
    listener = Listener("smtp://192.0.2.9:25", name="mx-in")
    return kind("7KQ2-M9X", "mx", listener, ("192.0.2.1", 4711), ("192.0.2.9", 25), 0.0)


def traced() -> TracedSession:
    made = session()
    assert isinstance(made, TracedSession)
    return made


def answer(of: TracedSession, stage: str, phase: str, verdict: str = "pass", mode: str = "enforce") -> None:
    of.trace.asked(stage)
    of.trace.answered(Seen(stage, phase, verdict, mode), 0.0, of.open_transaction)


async def exported(of: Session, reason: str = "quit") -> dict[str, ReadableSpan]:
    """The spans by their names, as they were given to the exporter."""
    exporter = InMemorySpanExporter()
    sent = Traces(ALL, exporter)
    sent.ended(of, reason)
    await sent.close()
    return {span.name: span for span in exporter.get_finished_spans()}


async def test_a_session_with_everything() -> None:
    one = traced()
    one.client.address = "198.51.100.7"
    answer(one, "slow", "connect")
    one.trace.connected("mta", "127.0.0.1", 2525, "ok", one.trace.begun, 0)
    one.transactions = 1
    one.transaction = mail = Transaction("7KQ2-M9X.1", "a@example.org", ())
    mail.recipients.append(Recipient("b@example.org", (), 0))
    mail.reply, mail.size = Reply.of("250 2.0.0 queued"), 42
    answer(one, "limit", "rcpt", "refuse", "observe")
    answer(one, "breaks", "data", "error")
    one.trace.transaction(1, mail, one.trace.begun)
    one.transaction = None
    one.trace.asked("hangs")
    found = await exported(one, "client_lost")
    root, transaction = found["smtp session"], found["transaction"]
    assert dict(root.attributes or {}) == {
        "client.address": "198.51.100.7", "client.port": 4711,
        "network.peer.address": "192.0.2.1", "network.peer.port": 4711,
        "server.address": "192.0.2.9", "server.port": 25,
        "network.protocol.name": "smtp", "network.transport": "tcp",
        "gateway.pipeline": "mx", "gateway.listener": "mx-in", "gateway.session.id": "7KQ2-M9X",
        "gateway.end_reason": "client_lost", "error.type": "client_lost", "gateway.transactions": 1,
    }  # fmt: skip
    assert (root.kind, root.parent, root.status.status_code) == (SpanKind.SERVER, None, StatusCode.ERROR)
    assert root.resource.attributes["service.name"] == "gateway"
    assert dict(transaction.attributes or {}) == {
        "gateway.transaction.id": "7KQ2-M9X.1", "gateway.transaction.size": 42,
        "gateway.transaction.recipients": 1, "gateway.transaction.reply": 250,
    }  # fmt: skip
    assert dict(found["rcpt limit"].attributes or {}) == {
        "gateway.stage": "limit", "gateway.phase": "rcpt", "gateway.verdict": "refuse", "gateway.mode": "observe"
    }  # fmt: skip
    assert (found["upstream connect"].attributes or {})["server.port"] == 2525
    parents = {name: span.parent and span.parent.span_id for name, span in found.items() if span is not root}
    assert root.context and transaction.context
    whole, message = root.context.span_id, transaction.context.span_id
    assert parents == {
        "connect slow": whole, "upstream connect": whole, "transaction": whole, "hangs": whole,
        "rcpt limit": message, "data breaks": message,
    }  # fmt: skip
    assert {span.context.trace_id for span in found.values() if span.context} == {root.context.trace_id}
    failed = {name for name, span in found.items() if span.status.status_code is StatusCode.ERROR}
    assert failed == {"smtp session", "data breaks", "hangs"}
    in_order = [found[name] for name in ("connect slow", "rcpt limit", "data breaks", "hangs")]
    starts = [span.start_time for span in in_order]
    assert starts == sorted(starts, key=lambda start: start or 0)
    assert root.end_time == max(span.end_time or 0 for span in found.values())
    for span in found.values():
        assert (root.start_time or 0) <= (span.start_time or 0) <= (span.end_time or 0)


async def test_an_upstream_that_is_down_at_a_unix_socket() -> None:
    one = traced()
    one.trace.connected("mta", "/run/lmtp", 0, "down", one.trace.begun, 0)
    span = (await exported(one))["upstream connect"]
    assert dict(span.attributes or {}) == {
        "gateway.pool": "mta", "gateway.result": "down", "error.type": "down",
        "server.address": "/run/lmtp", "network.transport": "unix",
    }  # fmt: skip
    assert (span.kind, span.status.status_code) == (SpanKind.CLIENT, StatusCode.ERROR)


async def test_children_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_CHILDREN", 3)
    one = traced()
    for number in range(5):
        answer(one, f"s{number}", "helo")
    found = await exported(one)
    assert len(found) == 4
    assert (found["smtp session"].attributes or {})["gateway.left_out"] == 2


async def test_other_sessions_have_no_spans() -> None:
    assert await exported(session(Session)) == {}


@pytest.mark.parametrize(("sample", "times"), [(0.0, 0), (1.0, 1000)])
async def test_the_share_of_sessions(sample: float, times: int) -> None:
    some = Traces(TraceSettings("http://127.0.0.1:9", sample), InMemorySpanExporter())
    assert sum(some.sampled() for _ in range(1000)) == times
    await some.close()


class Away(SpanExporter):
    """A collector that fails as it is told, and says when it was asked."""

    def __init__(self, *results: SpanExportResult | Exception) -> None:
        self.results = list(results)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


async def test_a_collector_that_is_away_is_logged_once() -> None:
    down, up = SpanExportResult.FAILURE, SpanExportResult.SUCCESS
    some = Traces(ALL, Away(up, OSError("no route"), down, down, up, up, down))
    with capture_logs() as log:
        for _ in range(7):
            some.ended(session(), "quit")
            assert some._processor.force_flush()
        await some.close()  # what the SDK's thread said comes before that it is over
    assert [record["event"] for record in log] == ["traces_failed", "traces_resumed", "traces_failed"]
    assert log[0]["error"] == "OSError: no route"


async def test_a_fault_in_making_spans_touches_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    some = Traces(ALL, InMemorySpanExporter())
    monkeypatch.setattr(some, "_write", lambda *_: 1 / 0)
    with capture_logs() as log:
        some.ended(session(), "quit")
    assert [record["error"] for record in log] == ["ZeroDivisionError: division by zero"]
    await some.close()


class Hung(InMemorySpanExporter):
    """A collector that takes a batch and does not answer before its connection is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.closed.wait()
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.closed.set()


async def test_the_stop_does_not_wait_for_a_collector_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "FLUSH_SECONDS", 0.01)
    hung = Hung()
    some = Traces(ALL, hung)
    some.ended(session(), "quit")
    with capture_logs() as log:
        await some.close()
    assert [record["event"] for record in log] == ["traces_failed"]
    assert hung.closed.is_set()


class Slow(SpanExporter):
    """A collector that takes its time."""

    def __init__(self) -> None:
        self.ready = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.ready.wait()
        return SpanExportResult.SUCCESS


async def test_spans_that_find_no_place_are_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "QUEUE", 512)  # and as many with the collector
    slow = Slow()
    some = Traces(ALL, slow)
    logging.getLogger("opentelemetry.sdk._shared_internal").warning("no repetition: the SDK drops those")
    some._words.first = ""
    with capture_logs() as log:
        for _ in range(1100):
            some.ended(session(), "quit")
        slow.ready.set()
        await some.close()
    assert [record["event"] for record in log][:1] == ["traces_failed"]
    assert log[0]["error"].startswith(spans.OVERFLOW)


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "endpoint"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("https://otel.example/", "https://otel.example/v1/traces"),
        ("https://otel.example/otlp/v1/traces", "https://otel.example/otlp/v1/traces"),
    ],
)
def test_settings(written: str, endpoint: str) -> None:
    raw = {"endpoint": written, "sample": "25%", "headers": {"authorization": "Bearer t0ken"}, "service_name": "mx"}
    settings = trace_settings(Process.model_validate({"traces": raw}))
    assert settings == TraceSettings(endpoint, 0.25, {"authorization": "Bearer t0ken"}, "mx")
    assert "t0ken" not in repr(settings)
    assert trace_settings(Process()) is None


@pytest.mark.parametrize(
    "more",
    [
        {"endpoint": "otel.example:4318"},
        {"endpoint": "grpc://otel.example"},
        {"endpoint": "https://tim:tanstaaf@otel.example"},
        {"endpoint": "https://otel.example/v1/traces?key=tanstaaf"},
        {"headers": {"two words": "tanstaaf"}},
        {"headers": {"x-key": "tanstaaf\n"}},
        {"sample": "101%"},
    ],
)
def test_settings_that_cannot_work(more: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        Process.model_validate({"traces": {"endpoint": "http://127.0.0.1:4318", **more}})
    assert "tanstaaf" not in "".join(error["msg"] for error in caught.value.errors())


@pytest.mark.parametrize("module", ["opentelemetry.none", "none.at.all"])
def test_a_missing_extra_is_said_at_load(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(process, "_OTEL", (module,))
    with pytest.raises(ValidationError, match=r"pip install 'mail-gateway\[otel\]'"):
        Process.model_validate({"traces": {"endpoint": "http://127.0.0.1:4318"}})
    Process.model_validate({})


def test_nothing_of_it_is_imported_where_no_traces_are_wanted() -> None:
    script = """
import sys, asyncio
from gateway.config.process import Process
from gateway.service.generation import Generation
from gateway.service.places import trace_settings
from gateway.service.worker import Worker
assert Process.model_validate({"workers": 2}).traces is None

async def serve():
    worker = Worker([], traces=trace_settings(Process()))
    await worker.open()
    await worker.close(0.0)

asyncio.run(serve())
print(sorted(name for name in sys.modules if name.startswith(("opentelemetry", "google.protobuf", "gateway.observe.spans"))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
