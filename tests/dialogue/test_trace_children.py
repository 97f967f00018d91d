"""Messages and upstream connections in the trace of their session, and the sessions that XCLIENT begins."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.observe.spans import Traces
from gateway.observe.traces import TraceSettings
from gateway.testing.gateway import Gateway
from tests.dialogue.obliging import Client, ObligingUpstream, between

pytestmark = pytest.mark.anyio

STAGES = [{"says": {"id": "looks", "at": "rcpt", "only": "nobody", "refuse": "POLICY"}}, {"splice": {"handoff": "never"}}]


async def spans_of(gateway: Gateway, *lines: str) -> list[ReadableSpan]:
    """What a client that says these lines leaves."""
    exporter = InMemorySpanExporter()
    traces = Traces(TraceSettings("http://127.0.0.1:9", 1.0), exporter)
    gateway.pipeline.trace(traces)
    client = await Client.connected(gateway.port)
    assert await client.code() == "220"
    for line in lines:
        await client.say(line)
    client.leave()
    await gateway.idle()
    await traces.close()
    return list(exporter.get_finished_spans())


def attributes(span: ReadableSpan, *names: str) -> list[object]:
    return [(span.attributes or {}).get(name) for name in names]


async def test_messages_hold_their_stages_and_their_connection() -> None:
    message = ("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA", "Subject: x\r\n\r\nhello\r\n.")
    async with ObligingUpstream().listening() as upstream, between(upstream, {"stages": STAGES}) as gateway:
        spans = await spans_of(gateway, "EHLO client.example", *message, *message, "QUIT")
        port = upstream.port
    one, other = sorted((span for span in spans if span.name == "transaction"), key=lambda span: span.start_time or 0)
    names = [f"gateway.transaction.{name}" for name in ("size", "recipients", "reply")]
    assert attributes(one, *names) == attributes(other, *names) == [21, 1, 250]
    assert (one.end_time or 0) <= (other.start_time or 0)
    (root,) = [span for span in spans if span.parent is None]
    assert attributes(root, "gateway.transactions") == [2]
    for message_span in (one, other):
        assert message_span.parent == root.context and message_span.context
        inside = [span for span in spans if span.parent and span.parent.span_id == message_span.context.span_id]
        expected = ["rcpt looks"] if message_span is other else ["rcpt looks", "upstream connect"]
        assert sorted(span.name for span in inside) == expected
        for span in inside:
            assert (message_span.start_time or 0) <= (span.start_time or 0) <= (span.end_time or 0)
            assert (span.end_time or 0) <= (message_span.end_time or 0)
    (dialed,) = [span for span in spans if span.name == "upstream connect"]
    assert attributes(dialed, "gateway.pool", "gateway.result", "server.address", "server.port") == [
        "mta", "ok", "127.0.0.1", port
    ]  # fmt: skip


async def test_an_upstream_that_is_down() -> None:
    async with ObligingUpstream().listening() as upstream:
        port = upstream.port
    async with between(ObligingUpstream(port=port), {"stages": STAGES}) as gateway:
        spans = await spans_of(gateway, "EHLO client.example", "MAIL FROM:<a@example.org>", "QUIT")
    dialed = [span for span in spans if span.name == "upstream connect"]
    assert dialed and all(attributes(span, "error.type") == ["down"] for span in dialed)


async def test_xclient_begins_another_trace() -> None:
    more = {"stages": STAGES, "trust": {"xclient": ["127.0.0.1"]}}
    async with ObligingUpstream().listening() as upstream, between(upstream, more) as gateway:
        spans = await spans_of(gateway, "EHLO client.example", "XCLIENT ADDR=192.0.2.1", "QUIT")
    found = [attributes(span, "client.address", "gateway.end_reason") for span in spans]
    assert found == [["127.0.0.1", "xclient"], ["192.0.2.1", "quit"]]
    assert len({span.context.trace_id for span in spans if span.context}) == 2
