"""Sessions that are traced, from the client's connection to a collector, and those that are not."""

from __future__ import annotations

import tracemalloc
from base64 import b64encode
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from gateway.observe import traces as recording
from gateway.observe.spans import Traces
from gateway.observe.traces import TracedSession, TraceSettings
from gateway.pipeline.meter import Meter
from gateway.service.worker import Worker
from gateway.session import Session
from gateway.testing.gateway import Gateway, compiled, free_port
from tests.dialogue.obliging import Client, ObligingUpstream, between
from tests.dialogue.stages import STAGES

pytestmark = pytest.mark.anyio

SAYS = [
    {"says": {"id": "fails", "at": "helo", "fail": True, "on_error": "pass"}},
    {"says": {"id": "allows", "at": "mail", "only": "friend", "allow": True}},
    {"says": {"id": "strict", "at": "rcpt", "only": "bad", "refuse": "POLICY"}},
    {"says": {"id": "looks", "at": "rcpt", "only": "b@", "refuse": "POLICY", "mode": "observe"}},
    {"users": {"users": {"mary": "tanstaaf"}}},
]
PIPELINE = {
    "name": "mx", "stages": [*SAYS, {"splice": {"handoff": "never"}}], "allow_plaintext_auth": True,
    "limits": {"auth_delay": 0},
}  # fmt: skip
LOGIN = b64encode(b"\0mary\0tanstaaf").decode()


async def mail(port: int) -> None:
    """A login, a message, a refused recipient."""
    client = await Client.connected(port)
    assert await client.code() == "220"
    assert await client.say("EHLO client.example") == "250"
    assert await client.say(f"AUTH PLAIN {LOGIN}") == "235"
    assert await client.say("MAIL FROM:<a@example.org>") == "250"
    assert await client.say("RCPT TO:<bad@example.org>") == "550"
    assert await client.say("RCPT TO:<b@example.org>") == "250"
    assert await client.say("DATA") == "354"
    assert await client.say("Subject: confidential\r\n\r\nhello\r\n.") == "250"
    assert await client.say("QUIT") == "221"
    client.leave()


async def traced(gateway: Gateway, sample: float = 1.0) -> list[ReadableSpan]:
    """The spans of one such session."""
    exporter = InMemorySpanExporter()
    traces = Traces(TraceSettings("http://127.0.0.1:9", sample), exporter)
    gateway.pipeline.trace(traces)
    await mail(gateway.port)
    await gateway.idle()
    await traces.close()
    return list(exporter.get_finished_spans())


async def test_stages_are_children_in_the_order_they_were_asked() -> None:
    async with ObligingUpstream().listening() as upstream, between(upstream, PIPELINE) as gateway:
        spans = await traced(gateway)
    (root,) = [span for span in spans if span.parent is None]
    stages = [span for span in spans if span.attributes and "gateway.phase" in span.attributes]
    stages.sort(key=lambda span: span.start_time or 0)
    assert [(span.name, *(list((span.attributes or {}).values())[2:4])) for span in stages] == [
        ("helo fails", "error", "enforce"),
        ("auth users", "authenticated", "enforce"),
        ("mail allows", "pass", "enforce"),
        ("rcpt strict", "refuse", "enforce"),
        ("rcpt strict", "pass", "enforce"),
        ("rcpt looks", "refuse", "observe"),
    ]
    assert [span.name for span in stages if span.status.status_code is StatusCode.ERROR] == ["helo fails"]
    ends = [root.start_time or 0]
    for span in stages:  # one after the other, within the session
        assert ends[-1] <= (span.start_time or 0) <= (span.end_time or 0)
        ends.append(span.end_time or 0)
    assert ends[-1] <= (root.end_time or 0)
    attributes = root.attributes or {}
    assert (attributes["gateway.end_reason"], attributes["client.address"]) == ("quit", "127.0.0.1")
    assert (attributes["server.port"], attributes["network.protocol.name"]) == (gateway.port, "smtp")


async def test_nobody_and_no_secret_is_named() -> None:
    async with ObligingUpstream().listening() as upstream, between(upstream, PIPELINE) as gateway:
        spans = await traced(gateway)
    text = "".join(span.to_json() for span in spans)
    assert "gateway.session.id" in text
    for secret in ("tanstaaf", LOGIN, "mary", "example.org", "confidential", "hello", "client.example"):
        assert secret not in text


async def test_tls(tls_files: tuple[Path, Path]) -> None:
    chain, key = tls_files
    more = {**PIPELINE, "tls": {"certificates": [{"chain": str(chain), "key": str(key)}]}}
    exporter = InMemorySpanExporter()
    async with ObligingUpstream().listening() as upstream, between(upstream, more) as gateway:
        traces = Traces(TraceSettings("http://127.0.0.1:9", 1.0), exporter)
        gateway.pipeline.trace(traces)
        client = await Client.connected(gateway.port)
        assert await client.code() == "220"
        assert await client.say("EHLO client.example") == "250"
        assert await client.say("STARTTLS") == "220"
        await client.start_tls()
        assert await client.say("NOOP") == "250"
        client.leave()
        await gateway.idle()
        await traces.close()
    (attributes,) = [span.attributes or {} for span in exporter.get_finished_spans() if span.parent is None]
    assert (attributes["tls.protocol.name"], attributes["tls.protocol.version"]) == ("tls", "1.3")
    assert attributes["gateway.end_reason"] in ("client_closed", "client_lost")


@pytest.mark.parametrize("sample", [None, 0.0])
async def test_sessions_that_are_not_sampled_do_nothing_for_it(sample: float | None) -> None:
    exporter = InMemorySpanExporter()
    async with ObligingUpstream().listening() as upstream, between(upstream, PIPELINE) as gateway:
        traces = Traces(TraceSettings("http://127.0.0.1:9", sample or 0.0), exporter)
        if sample is not None:
            gateway.pipeline.trace(traces)
        waiting = await Client.connected(gateway.port)
        assert await waiting.code() == "220"
        (conversation,) = gateway.pipeline.conversations
        assert type(conversation.session) is Session
        assert conversation.chain is gateway.pipeline.plan.chain
        assert {type(step.meter) for step in (*conversation.chain.rcpt, *conversation.chain.auth)} == {Meter}
        tracemalloc.start()
        try:
            await mail(gateway.port)
            taken = tracemalloc.take_snapshot()
        finally:
            tracemalloc.stop()
        waiting.leave()
        await gateway.idle()
        await traces.close()
    assert exporter.get_finished_spans() == ()
    ours = [tracemalloc.Filter(True, recording.__file__)]
    assert not taken.filter_traces(ours).traces


async def test_every_sampled_session_has_its_own_trace() -> None:
    exporter = InMemorySpanExporter()
    async with ObligingUpstream().listening() as upstream, between(upstream, PIPELINE) as gateway:
        traces = Traces(TraceSettings("http://127.0.0.1:9", 1.0), exporter)
        gateway.pipeline.trace(traces)
        clients = [await Client.connected(gateway.port) for _ in range(3)]
        for client in clients:
            assert await client.code() == "220"
            assert await client.say("HELO client.example") == "250"
        assert all(isinstance(one.session, TracedSession) for one in gateway.pipeline.conversations)
        for client in clients:
            client.leave()
        await gateway.idle()
        await traces.close()
    spans = exporter.get_finished_spans()
    assert len({span.context.trace_id for span in spans if span.context}) == 3
    assert len([span for span in spans if span.parent is None]) == 3


async def test_a_collector_gets_them(tmp_path: Path) -> None:
    got: list[ExportTraceServiceRequest] = []
    authorized: list[str] = []

    async def take(request: web.Request) -> web.Response:
        authorized.append(request.headers["authorization"])
        got.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(body=b"", content_type="application/x-protobuf")

    collector = web.Application()
    collector.router.add_post("/v1/traces", take)
    async with TestServer(collector) as server, ObligingUpstream().listening() as upstream:
        port = free_port()
        written = {
            **PIPELINE, "hostname": "gateway.test", "listen": [f"smtp://127.0.0.1:{port}"],
            "upstreams": {"mta": {"servers": [f"smtp://127.0.0.1:{upstream.port}"]}}, "relay": "open",
        }  # fmt: skip
        settings = TraceSettings(
            f"http://127.0.0.1:{server.port}/v1/traces", 1.0, {"authorization": "Bearer t0ken"}, "mail"
        )
        worker = Worker([compiled(written, tmp_path, STAGES)], traces=settings)
        await worker.open()
        await mail(port)
        await worker.close(5.0)
    assert set(authorized) == {"Bearer t0ken"}
    resources = [found for request in got for found in request.resource_spans]
    named = {pair.key: pair.value.string_value for pair in resources[0].resource.attributes}
    assert named["service.name"] == "mail" and named["service.instance.id"]
    spans = [span for found in resources for scope in found.scope_spans for span in scope.spans]
    (root,) = [span for span in spans if not span.parent_span_id]
    assert root.name == "smtp session"
    assert {"helo fails", "auth users", "mail allows", "rcpt strict", "rcpt looks"} < {span.name for span in spans}
    assert {span.trace_id for span in spans} == {root.trace_id}
