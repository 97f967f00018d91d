"""Opening the upstream for a session, and what happens to the connection after it.

In this order: a server of the pool, PROXY header, TLS or greeting + STARTTLS, EHLO (`dial`), XCLIENT, AUTH; at a mail
store somebody must be logged in then (`store_login`). A server
that cannot be reached, is busy or breaks off is replaced by another one; a stage's word is final. Where the pool
allows reuse, connections that spoke for nobody wait for the next session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Protocol

import structlog

from gateway.observe import metrics
from gateway.observe.traces import TracedSession
from gateway.upstream.connection import UpstreamConnection, UpstreamError
from gateway.upstream.dial import ClientRefused, LoopDetected, dial
from gateway.upstream.pool import Pool, PoolBusy, PoolDown
from gateway.upstream.smtp import Connection
from gateway.upstream.store import StoreConnection
from gateway.upstream.store_login import log_in
from gateway.verdicts import Cause, Refuse

if TYPE_CHECKING:
    from gateway.observe.transcript import Transcript
    from gateway.session import Session
    from gateway.stage import Stage
    from gateway.upstream.server import Server

log = structlog.get_logger("gateway.upstream")

ErrorMessages = Literal["auto", "always", "never"]
"""When a client reads a server's own words in place of ours (`pass_error_message` of splice)."""

_LOGIN = (Cause.AUTH_FAILED, Cause.LOGIN_REFUSED, Cause.AUTH_UNAVAILABLE)

Hooks = tuple[tuple["Stage", Callable[..., object]], ...]


class UpstreamHooks(Protocol):
    """What the prelude asks of a chain: the hooks of its stages, in the file's order."""

    @property
    def upstream_connect(self) -> Hooks: ...
    @property
    def upstream_ready(self) -> Hooks: ...
    @property
    def upstream_login(self) -> Hooks: ...


class _Refused(Exception):
    """A stage refused before the conversation began; carries its verdict."""

    def __init__(self, refuse: Refuse) -> None:
        super().__init__(refuse.cause.value)
        self.refuse = refuse


async def open_upstream(
    session: Session,
    pool: Pool,
    hooks: UpstreamHooks,
    *,
    hostname: str,
    instance: str = "",
    exclude: Collection[Server] = (),
    transcript: Transcript | None = None,
    pass_error_message: ErrorMessages = "auto",
    login: bool = True,
) -> UpstreamConnection | Refuse:
    """A connection on which MAIL can be said for this session, or the client is logged in; or the client's refusal.

    `hostname` goes into EHLO; `instance` is in our own greetings and nobody else's. `exclude` are servers to avoid
    while the pool has others. `pass_error_message`: whether the server's refusals are the client's replies, see
    `_worded`.
    `login=False`: nobody logs in here (AUTH is relayed later). Never raises but for cancellation; then nothing stays
    open.
    """
    opening = _Opening(session, pool, hooks, hostname, instance, transcript, login)
    tried = set() if all(server in exclude for server in pool.servers) else set(exclude)
    failures: list[UpstreamError] = []
    while True:
        try:
            server = await pool.acquire(session, tried)
        except PoolBusy as busy:
            return Refuse(Cause.UPSTREAM_BUSY, log=_reasons(failures, str(busy)))
        except PoolDown as down:
            return _worded(_nobody_left(failures, str(down)), pass_error_message)
        try:
            opened = await _open_on(server, opening)
            return _worded(opened, pass_error_message) if isinstance(opened, Refuse) else opened
        except LoopDetected as loop:
            return Refuse(Cause.LOOP, temporary=True, log=str(loop))
        except UpstreamError as error:
            failures.append(error)
            tried.add(server)


def _nobody_left(failures: list[UpstreamError], text: str) -> Refuse:
    if not failures:
        return Refuse(Cause.UPSTREAM_DOWN, log=text)
    busy = all(failure.kind == "busy" for failure in failures)
    cause = Cause.UPSTREAM_BUSY if busy else Cause.UPSTREAM_DOWN
    return Refuse(cause, reply=failures[-1].reply, log=_reasons(failures))


def _worded(refuse: Refuse, messages: ErrorMessages) -> Refuse:
    """The refusal with the server's words or without.

    `auto`: with them only where they judge the client (architecture, "Replies"). `always` and `never` are nginx's
    proxy_pass_error_message: any refusal, and none; what is not about the login is then an outage in either case.
    """
    login = refuse.cause in _LOGIN
    if refuse.reply is None:
        return refuse
    if refuse.reply.code < 400:  # out of place; the client would go on
        return replace(refuse, reply=None)
    if messages == "auto":
        judged = not login and refuse.cause not in (
            Cause.UPSTREAM_DOWN, Cause.UPSTREAM_BUSY, Cause.UPSTREAM_MISCONFIGURED
        )  # fmt: skip
        return refuse if judged else replace(refuse, reply=None)
    cause = refuse.cause if login else Cause.UPSTREAM_DOWN
    if cause is Cause.AUTH_FAILED:
        cause = Cause.LOGIN_REFUSED
    return replace(refuse, cause=cause, reply=refuse.reply if messages == "always" else None)


def _reasons(failures: list[UpstreamError], last: str = "") -> str:
    return "; ".join([*map(str, failures), *filter(None, [last])])


@dataclass(frozen=True, slots=True)
class _Opening:
    """What `open_upstream` was asked."""

    session: Session
    pool: Pool
    hooks: UpstreamHooks
    hostname: str
    instance: str
    transcript: Transcript | None
    login: bool


async def _open_on(server: Server, opening: _Opening) -> UpstreamConnection | Refuse:
    """The prelude on one server, whose place in the pool we hold. Raises UpstreamError if another may do better."""
    pool, hooks = opening.pool, opening.hooks
    while True:
        # A PROXY header goes in front of everything, so that a used connection cannot take it.
        connection: UpstreamConnection | None = None if hooks.upstream_connect else _take_idle(server, pool)
        reused = connection is not None
        if connection is not None:
            name, url = shown(pool, server)
            metrics.counter("gateway_upstream_reused_total", pipeline=pool.pipeline, pool=name, server=url).add()
        else:
            _make_room(server, pool)
            opened = await _open_new(server, opening)
            if isinstance(opened, Refuse):
                return opened
            connection = opened
        connection.pool = pool
        connection.transcript = opening.transcript
        connection.client_tag = opening.session.tag
        connection.on_end = lambda: pool.release(server)
        try:
            refuse = await _introduce(connection, opening)
        except UpstreamError:
            if not reused:
                connection.abort()
                raise
            # It had gone while it waited; the place in the pool is kept for the next try on this server.
            connection.on_end = None
            connection.abort()
            continue
        except BaseException:
            connection.abort()
            raise
        if refuse is None and not connection.greeted:
            refuse = Refuse(Cause.UPSTREAM_DOWN, log=f"{server.url}: the last EHLO was refused")
        if refuse is not None:
            connection.end_quietly()
            return refuse
        return connection


async def _introduce(connection: UpstreamConnection, opening: _Opening) -> Refuse | None:
    """Tell the server who the client is, and log in. Raises UpstreamError."""
    session, hooks = opening.session, opening.hooks
    refuse = await _ask(hooks.upstream_ready, "upstream_ready", session, connection)
    if refuse is None and opening.login:
        refuse = await _ask(hooks.upstream_login, "upstream_login", session, connection)
        if refuse is None and isinstance(connection, StoreConnection) and not connection.logged_in:
            refuse = await log_in(session, connection)
    return refuse


async def _open_new(server: Server, opening: _Opening) -> UpstreamConnection | Refuse:
    """Dial, tell the pool how that went; the place in the pool is given back unless there is a connection."""
    session, pool, hooks = opening.session, opening.pool, opening.hooks

    def preface(connection: UpstreamConnection) -> None:
        _ask_connect(hooks.upstream_connect, session, connection)

    opened, result, begun = None, "canceled", perf_counter()
    try:
        opened = await dial(
            server,
            pool.settings,
            hostname=opening.hostname,
            instance=opening.instance,
            preface=preface if hooks.upstream_connect else None,
            transcript=opening.transcript,
            esmtp=session.esmtp,
        )
        pool.succeeded(server)
        if opened.ehlo is not None:
            pool.learned(server, opened.ehlo)
        result = "ok"
        return opened
    except _Refused as refused:
        result = "refused"
        return refused.refuse
    except ClientRefused as refused:
        pool.succeeded(server)
        result = "refused"
        return Refuse(Cause.ACCESS_DENIED, reply=refused.reply)
    except UpstreamError as error:
        result = error.kind
        if error.kind != "busy":
            pool.failed(server, error.text, slow=error.kind == "timeout")
        log.info("upstream_failure", session=session.id, server=server.url, kind=error.kind, error=error.text)
        raise
    finally:
        _count(pool, server, opened, result, perf_counter() - begun)
        if isinstance(session, TracedSession):
            target = server.target
            place = (target.path, 0) if target.path else (target.host, target.port)
            session.trace.connected(pool.name, *place, result, begun, session.open_transaction)
        if opened is None:
            pool.release(server)


def _count(pool: Pool, server: Server, opened: UpstreamConnection | None, result: str, seconds: float) -> None:
    """What came of opening a connection. Octets are counted from here on, those that passed already too."""
    pipeline, (name, url) = pool.pipeline, shown(pool, server)
    metrics.counter(
        "gateway_upstream_connections_total", pipeline=pipeline, pool=name, server=url, result=result
    ).add()
    if opened is not None:
        metrics.histogram(
            "gateway_upstream_connect_seconds", pipeline=pipeline, pool=name, server=url
        ).observe(seconds)
        opened.wire.count(
            metrics.counter("gateway_upstream_bytes_total", pipeline=pipeline, direction="in"),
            metrics.counter("gateway_upstream_bytes_total", pipeline=pipeline, direction="out"),
        )


def shown(pool: Pool, server: Server) -> tuple[str, str]:
    """The names of both in metrics: those that the configuration knows."""
    return (metrics.DYNAMIC, metrics.DYNAMIC) if pool.dynamic else (pool.name, server.url)


def _ask_connect(hooks: Hooks, session: Session, connection: UpstreamConnection) -> None:
    """The plain functions of `upstream_connect`. Raises _Refused."""
    for stage, hook in hooks:
        try:
            verdict = hook(session, connection)
            refuse = _refusal(verdict)
        except Exception as error:
            raise _Refused(stage_failed(stage, "upstream_connect", session, error)) from error
        if refuse is not None:
            raise _Refused(refuse)


async def _ask(hooks: Hooks, phase: str, session: Session, connection: UpstreamConnection) -> Refuse | None:
    """Each stage in turn until one refuses; a stage that raises has refused. Raises UpstreamError as it is."""
    for stage, hook in hooks:
        try:
            verdict = hook(session, connection)
            if isinstance(verdict, Awaitable):
                async with asyncio.timeout(stage.timeout):
                    verdict = await verdict
            refuse = _refusal(verdict)
        except UpstreamError:
            raise
        except Exception as error:
            return stage_failed(stage, phase, session, error)
        if refuse is not None:
            return refuse
    return None


def _refusal(verdict: object) -> Refuse | None:
    """The one answer there is at the upstream. Raises TypeError for what is none."""
    if verdict is None or isinstance(verdict, Refuse):
        return verdict
    raise TypeError(f"a server cannot be answered with {type(verdict).__name__}")


def stage_failed(stage: Stage, phase: str, session: Session, error: Exception) -> Refuse:
    """What `on_error` makes of a stage that failed at the upstream; it never passes there."""
    why = "time-out" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
    action = stage.on_error
    log.warning("stage_failure", session=session.id, stage=stage.id, phase=phase, error=why, action=action)
    text = f"{stage.id} in {phase}: {why}"
    return Refuse(Cause.STAGE_FAILED, temporary=action != "reject", disconnect=action == "disconnect", log=text)


# --- reuse


def give_back(connection: UpstreamConnection, ok: bool = True) -> None:
    """The session needs this connection no more: keep it for another one where that is safe, else say QUIT.

    Kept are connections of a pool with `reuse`, in step, that spoke for no client, got no 4xx or 5xx and have
    carried less than `reuse_transactions` messages, for `reuse_idle` seconds; those of mail stores never. `ok=False`
    ends it in any case.
    """
    pool = connection.pool
    if (
        not ok
        or not isinstance(connection, Connection)
        or pool is None
        or not pool.settings.reuse
        or not pool.keeping
        or not connection.reusable
        or connection.transactions >= pool.settings.reuse_transactions
        or not connection.idle
    ):
        connection.end_quietly()
        return
    connection.transcript = None
    connection.server.idle.append(connection)
    connection.idle_timer = asyncio.get_running_loop().call_later(pool.settings.reuse_idle, _expire, connection)
    connection.wire.on_gone = lambda error: _drop(connection)
    connection.wire.on_data = lambda: _drop(connection)
    connection.put_aside()


def _take_idle(server: Server, pool: Pool) -> Connection | None:
    """The connection used last, if the server has not closed it meanwhile."""
    while pool.settings.reuse and server.idle:
        connection = server.idle.pop()
        connection.stop_waiting()
        if connection.idle:
            return connection
        connection.abort()
    return None


def _make_room(server: Server, pool: Pool) -> None:
    """A waiting connection counts too: with the one to be opened the server must not have too many."""
    while server.idle and server.active + len(server.idle) > pool.settings.max_connections:
        oldest = server.idle.popleft()
        oldest.stop_waiting()
        oldest.end_quietly()


def _expire(connection: Connection) -> None:
    """It waited long enough."""
    connection.server.idle.remove(connection)
    connection.stop_waiting()
    connection.end_quietly()


def _drop(connection: Connection) -> None:
    """The server closed it or spoke out of turn."""
    connection.server.idle.remove(connection)
    connection.stop_waiting()
    connection.abort()
