"""Spans of sampled sessions, for OpenTelemetry. Imported only where traces are configured: needs the extra `otel`.

Spans are made when a session is over, with the times that it wrote down, and wait in the SDK's queue for its thread,
which sends them in batches. A collector that is away costs spans and never a session; the log says so once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import threading
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from random import random
from time import perf_counter
from typing import Final

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context

from gateway.observe.traces import Answered, Carried, Dialed, Trace, TracedSession, TraceSettings
from gateway.session import Session

log = structlog.get_logger("gateway.traces")

Attributes = Mapping[str, str | int | bool]

QUEUE: Final = 8192  # spans that wait for the collector
EXPORT_SECONDS: Final = 10.0  # of one batch, with its retries
FLUSH_SECONDS: Final = 3.0  # for what is left at a stop
OVERFLOW: Final = "Queue full"  # so the SDK says that it threw a span away
BROKEN: Final = ("client_lost", "internal_error", "timeout", "tls_failed", "upstream_lost")
"""Ends of a session (label `reason` of `gateway_sessions_total`) that are errors of its span."""

_ERROR: Final = Status(StatusCode.ERROR)
_NO_PARENT: Final = Context()


class Traces:
    """The traces of one worker. Make it on the worker's loop, after the fork: it starts the SDK's thread.

    `exporter` instead of the one for `settings.endpoint`.
    """

    def __init__(self, settings: TraceSettings, exporter: SpanExporter | None = None) -> None:
        self._sample = settings.sample
        self._loop = asyncio.get_running_loop()
        self._failing = False
        self._words = _LastWords()
        sdk = logging.getLogger("opentelemetry")
        sdk.propagate = False
        sdk.addHandler(self._words)
        if exporter is None:
            exporter = OTLPSpanExporter(settings.endpoint, headers=dict(settings.headers), timeout=EXPORT_SECONDS)
        self._exporter = _Watched(exporter, self)
        self._processor = BatchSpanProcessor(self._exporter, max_queue_size=QUEUE)
        resource = Resource.create(
            {
                "service.name": settings.service_name,
                "service.version": version("mail-gateway"),
                "service.instance.id": str(uuid.uuid4()),
                "host.name": platform.node(),
                "process.pid": os.getpid(),
            }
        )
        provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("gateway", version("mail-gateway"))

    def sampled(self) -> bool:
        """Whether the session that begins now is one of those that are traced."""
        return random() < self._sample

    def ended(self, session: Session, reason: str) -> None:
        """Hand over the spans of a sampled session; `reason` as in `gateway_sessions_total`. Never raises."""
        if not isinstance(session, TracedSession):
            return
        try:
            self._write(session, reason)
        except Exception as error:
            self.tell(f"{type(error).__name__}: {error}")

    async def close(self) -> None:
        """Send what is left, for FLUSH_SECONDS at most. Whatever is not sent then is lost, and the log says so."""
        over = asyncio.Event()

        def shut_down() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(over.set)

        threading.Thread(target=shut_down, name="traces-end", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await over.wait()
        except TimeoutError:
            self._exporter.shutdown()  # ends its retries
            why = f": {self._words.first}" if self._words.first else ""
            self.tell(f"the last spans were not sent within {FLUSH_SECONDS:g} s{why}")
        sdk = logging.getLogger("opentelemetry")
        sdk.addHandler(logging.NullHandler())  # its thread may have something to say yet
        sdk.removeHandler(self._words)

    # -- spans ----------------------------------------------------------------------------------------------

    def _write(self, session: TracedSession, reason: str) -> None:
        trace, now = session.trace, perf_counter()
        root = self._span(
            f"{session.protocol} session", _NO_PARENT, trace.at(trace.begun), _of_session(session, reason),
            SpanKind.SERVER,
        )  # fmt: skip
        whole = set_span_in_context(root, _NO_PARENT)
        parents: dict[int, Context] = {}
        for one in trace.carried:
            span = self._span("transaction", whole, trace.at(one.begun), _of_transaction(one))
            parents[one.number] = set_span_in_context(span, _NO_PARENT)
            span.end(trace.at(one.ended))
        for dialed in trace.dialed:
            parent = parents.get(dialed.transaction, whole)
            span = self._span("upstream connect", parent, trace.at(dialed.begun), _of_dialed(dialed), SpanKind.CLIENT)
            if dialed.result not in ("ok", "refused"):
                span.set_status(_ERROR)
            span.end(trace.at(dialed.ended))
        for answer in trace.answers:
            self._write_answer(trace, answer, parents.get(answer.transaction, whole))
        for stage, begun in trace.unanswered.items():
            span = self._span(stage, whole, trace.at(begun), {"gateway.stage": stage, "error.type": "canceled"})
            span.set_status(_ERROR)
            span.end(trace.at(now))
        if reason in BROKEN:
            root.set_status(_ERROR)
        root.end(trace.at(now))

    def _write_answer(self, trace: Trace, answer: Answered, parent: Context) -> None:
        seen = answer.seen
        attributes = {
            "gateway.stage": seen.stage,
            "gateway.phase": seen.phase,
            "gateway.verdict": seen.verdict,
            "gateway.mode": seen.mode,
        }
        failed = seen.verdict == "error"
        if failed:
            attributes["error.type"] = "stage_failed"
        span = self._span(f"{seen.phase} {seen.stage}", parent, trace.at(answer.begun), attributes)
        if failed:
            span.set_status(_ERROR)
        span.end(trace.at(answer.ended))

    def _span(
        self, name: str, parent: Context, begun: int, attributes: Attributes, kind: SpanKind = SpanKind.INTERNAL
    ) -> Span:
        return self._tracer.start_span(name, parent, kind, attributes, start_time=begun)

    # -- what became of them --------------------------------------------------------------------------------

    def exported(self, result: SpanExportResult) -> None:
        """A batch was sent, or was not. Called by the SDK's thread."""
        error, self._words.first = self._words.first, ""
        if result is not SpanExportResult.SUCCESS:
            error = error or "no reason given"
        elif not error.startswith(OVERFLOW):  # a retry that helped
            error = ""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self.tell, error)

    def tell(self, error: str) -> None:
        """Log that spans are lost, once, and once that they are sent again (no error)."""
        if error and not self._failing:
            self._failing = True
            log.warning("traces_failed", error=error[:300])
        elif not error and self._failing:
            self._failing = False
            log.info("traces_resumed")


class _Watched(SpanExporter):
    """An exporter whose results are looked at."""

    def __init__(self, exporter: SpanExporter, traces: Traces) -> None:
        self._exporter = exporter
        self._traces = traces

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch; an exception is a failure, too."""
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            self._traces._words.first = f"{type(error).__name__}: {error}"
            result = SpanExportResult.FAILURE
        self._traces.exported(result)
        return result

    def shutdown(self) -> None:
        """Nothing is sent any more."""
        self._exporter.shutdown()


class _LastWords(logging.Handler):
    """Takes what the SDK logs, which would go to standard error: the first warning since it was read last."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.first = self.first or record.getMessage()


# -- attributes: those of the semantic conventions where they have one, else `gateway.*` -----------------------------


def _of_session(session: TracedSession, reason: str) -> dict[str, str | int | bool]:
    """Neither logins nor mail addresses: the log has them, by the session's id."""
    (address, port), unix = session.accepted_at, session.listener.url.partition("unix:")[1]
    attributes: dict[str, str | int | bool] = {
        "client.address": session.client.address,
        "client.port": session.client.port,
        "server.address": address,
        "server.port": port,
        "network.protocol.name": session.protocol,
        "network.transport": "unix" if unix else "tcp",
        "gateway.pipeline": session.pipeline,
        "gateway.listener": session.listener.name,
        "gateway.session.id": session.id,
        "gateway.end_reason": reason,
        "gateway.transactions": session.transactions,
    }
    if session.peer[0] != session.client.address:
        attributes["network.peer.address"], attributes["network.peer.port"] = session.peer
    if session.tls is not None:
        attributes["tls.protocol.name"] = "tls"
        attributes["tls.protocol.version"] = session.tls.version.removeprefix("TLSv")
        attributes["tls.cipher"] = session.tls.cipher
        attributes["tls.resumed"] = session.tls.resumed
    if reason in BROKEN:
        attributes["error.type"] = reason
    if session.trace.left_out:
        attributes["gateway.left_out"] = session.trace.left_out
    return attributes


def _of_transaction(one: Carried) -> dict[str, str | int | bool]:
    attributes: dict[str, str | int | bool] = {
        "gateway.transaction.id": one.id,
        "gateway.transaction.size": one.size,
        "gateway.transaction.recipients": one.recipients,
    }
    if one.code:
        attributes["gateway.transaction.reply"] = one.code
    return attributes


def _of_dialed(one: Dialed) -> dict[str, str | int | bool]:
    attributes: dict[str, str | int | bool] = {
        "gateway.pool": one.pool,
        "gateway.result": one.result,
        "server.address": one.host,
        "network.transport": "tcp" if one.port else "unix",
    }
    if one.port:
        attributes["server.port"] = one.port
    if one.result not in ("ok", "refused"):
        attributes["error.type"] = one.result
    return attributes
