from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.protocol.smtp import Reply
from gateway.session import Session
from gateway.upstream.pool import Pool, PoolSettings
from gateway.upstream.prelude import give_back, open_upstream
from gateway.upstream.smtp import Connection, quits_done
from gateway.verdicts import Cause, Refuse

pytestmark = pytest.mark.anyio

EHLO = "C: EHLO gw.example\nS: 250-mx.example\nS: 250-PIPELINING\nS: 250 SIZE 1000"
READY = "S: 220 mx.example ESMTP\n" + EHLO
QUIT = "\nC: QUIT\nS: 221 bye"
OFFERS_TLS = "S: 220 mx.example ESMTP\nC: EHLO gw.example\nS: 250-mx.example\nS: 250 STARTTLS\nC: STARTTLS\n"
GOOD = READY + QUIT

Peers = Callable[..., Awaitable[Any]]
NewSession = Callable[..., Session]


class Hooks:
    """A chain of one stage with the given upstream hooks."""

    def __init__(self, timeout: float = 5.0, on_error: str = "tempfail", **hooks: Callable[..., object]) -> None:
        stage = SimpleNamespace(id="stage", timeout=timeout, on_error=on_error)
        for name in ("upstream_connect", "upstream_ready", "upstream_login"):
            setattr(self, name, ((stage, hooks[name]),) if name in hooks else ())


@pytest.fixture
def opened(new_session: NewSession) -> Callable[..., Awaitable[Connection | Refuse]]:
    """Open the upstream of a pool for a new session."""

    async def open_(pool: Pool, hooks: Hooks | None = None, **options: Any) -> Connection | Refuse:
        return await open_upstream(new_session(), pool, hooks or Hooks(), hostname="gw.example", **options)  # type: ignore

    return open_


Opened = Callable[..., Awaitable[Connection | Refuse]]


def pool_of(*peers: Any, **settings: Any) -> Pool:
    urls = tuple((peer if isinstance(peer, str) else peer.url, 1) for peer in peers)
    return Pool("mta", PoolSettings(servers=urls, **settings))


async def ended(*results: Connection | Refuse) -> None:
    """End the connections and check that the pool has all its places back."""
    for result in results:
        if isinstance(result, Connection):
            result.end_quietly()
    await quits_done()


async def test_a_server_that_answers(peers: Peers, opened: Opened) -> None:
    pool = pool_of(await peers(GOOD))
    connection = await opened(pool)
    assert isinstance(connection, Connection)
    assert connection.greeting == Reply(220, (b"mx.example ESMTP",))
    assert pool.profile() == {"PIPELINING": "", "SIZE": "1000"}
    assert pool.servers[0].active == 1
    await ended(connection)
    assert pool.servers[0].active == 0


@pytest.mark.parametrize(
    ("first", "cause", "ejected"),
    [
        ("closed port", Cause.UPSTREAM_DOWN, True),
        ("S: 421 busy\nhang", Cause.UPSTREAM_BUSY, False),
        ("S: 450 later" + QUIT, Cause.UPSTREAM_DOWN, True),
        ("S: 554 no" + QUIT, Cause.UPSTREAM_DOWN, True),
        ("close", Cause.UPSTREAM_DOWN, True),
        ("raw 220-\nclose", Cause.UPSTREAM_DOWN, True),
        ("S: +OK pop3 here\nhang", Cause.UPSTREAM_DOWN, True),
        ("wait", Cause.UPSTREAM_DOWN, True),
        ("S: 220 mx\nC: EHLO gw.example\nS: 421 busy\nhang", Cause.UPSTREAM_BUSY, False),
        ("S: 220 mx\nC: EHLO gw.example\nclose", Cause.UPSTREAM_DOWN, True),
        ("S: 220 mx\nC: EHLO gw.example\nS: 250 ok\nS: 421 bye\nhang", Cause.UPSTREAM_DOWN, True),
        ("S: 220 mx\nC: EHLO gw.example\nS: 550 no\nC: HELO gw.example\nS: 550 no" + QUIT, Cause.UPSTREAM_DOWN, True),
        ("S: 220 mx\nC: EHLO gw.example\nS: 450 later" + QUIT, Cause.UPSTREAM_DOWN, True),
    ],
)
async def test_a_server_that_fails_is_replaced_by_another(
    peers: Peers, opened: Opened, closed_port: str, first: str, cause: Cause, ejected: bool
) -> None:
    bad = closed_port if first == "closed port" else await peers(first)
    pool = pool_of(bad, await peers(GOOD), greeting_timeout=0.1 if first == "wait" else 30.0)
    connection = await opened(pool)
    assert isinstance(connection, Connection)
    assert connection.server is pool.servers[1]
    assert (pool.servers[0].failures == 1) is ejected
    assert [server.active for server in pool.servers] == [0, 1]
    alone = await opened(pool_of(bad, greeting_timeout=0.1 if first == "wait" else 30.0))
    assert isinstance(alone, Refuse)
    assert alone.cause is cause
    assert pool.servers[0].url in alone.log
    await ended(connection)
    assert [server.active for server in pool.servers] == [0, 0]


async def test_all_down_is_refused_at_once_with_each_reason(opened: Opened, peers: Peers, closed_port: str) -> None:
    pool = pool_of(closed_port, await peers("S: 554 go away" + QUIT))
    refuse = await opened(pool)
    assert isinstance(refuse, Refuse) and refuse.reply is None
    assert "cannot connect" in refuse.log and "go away" in refuse.log
    pool.probed(pool.servers[0], "dead")
    pool.probed(pool.servers[1], "dead too")
    refuse = await opened(pool)
    assert isinstance(refuse, Refuse) and refuse.cause is Cause.UPSTREAM_DOWN and "dead too" in refuse.log
    await ended()


async def test_a_full_pool_is_busy(peers: Peers, opened: Opened) -> None:
    pool = pool_of(await peers(GOOD), max_connections=1, queue=0)
    connection = await opened(pool)
    refuse = await opened(pool)
    assert isinstance(refuse, Refuse) and refuse.cause is Cause.UPSTREAM_BUSY
    await ended(connection)


async def test_excluded_servers_are_used_only_where_there_are_no_others(peers: Peers, opened: Opened) -> None:
    pool = pool_of(await peers(GOOD), await peers(GOOD))
    one = await opened(pool, exclude={pool.servers[0]})
    both = await opened(pool, exclude=set(pool.servers))
    assert isinstance(one, Connection) and one.server is pool.servers[1]
    assert isinstance(both, Connection)
    await ended(one, both)


async def test_our_own_greeting_is_a_loop(peers: Peers, opened: Opened) -> None:
    refuse = await opened(pool_of(await peers("S: 220 mx ESMTP 5f3a" + QUIT)), instance="5f3a")
    assert isinstance(refuse, Refuse)
    assert (refuse.cause, refuse.temporary) == (Cause.LOOP, True)
    await ended()


async def test_a_session_that_ends_meanwhile_leaves_nothing_open(peers: Peers, opened: Opened) -> None:
    peer = await peers("S: 220 mx\nhang")
    pool = pool_of(peer)
    task = asyncio.ensure_future(opened(pool))
    await peer.arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(peer.gone.wait(), 5)
    assert pool.servers[0].active == 0


# --- TLS


@pytest.mark.parametrize(
    ("policy", "verify", "dialogue", "encrypted", "tls"),
    [
        ("off", True, "S: 220 mx.example ESMTP\nC: EHLO gw.example\nS: 250-mx.example\nS: 250 STARTTLS", False, False),
        ("opportunistic", True, OFFERS_TLS + "S: 220 go\ntls\n" + EHLO, True, False),
        ("opportunistic", True, OFFERS_TLS + "S: 454 not now", False, False),
        ("opportunistic", True, READY, False, False),
        ("required", True, OFFERS_TLS + "S: 220 go\ntls\n" + EHLO, True, True),
        ("required", False, OFFERS_TLS + "S: 220 go\ntls\n" + EHLO, True, True),
    ],
)
async def test_starttls_as_the_pool_wants_it(
    peers: Peers, opened: Opened, ca_file: str, policy: str, verify: bool, dialogue: str, encrypted: bool, tls: bool
) -> None:
    ca = ca_file if verify and policy == "required" else None
    pool = pool_of(await peers(dialogue + QUIT), tls=policy, verify=verify, ca_file=ca)
    connection = await opened(pool)
    assert isinstance(connection, Connection), connection
    assert (connection.encrypted, connection.tls) == (encrypted, tls)
    assert ("STARTTLS" in connection.extensions) is (not encrypted and READY not in dialogue)
    await ended(connection)


@pytest.mark.parametrize(
    ("policy", "dialogue", "settings", "reason"),
    [
        ("required", READY + QUIT, {}, "not offered"),
        ("required", OFFERS_TLS + "S: 454 not now" + QUIT, {}, "STARTTLS refused: 454"),
        ("required", OFFERS_TLS + "S: 220 go\ntls", {"ca_file": None}, "certificate not accepted"),
        ("required", OFFERS_TLS + "S: 220 go\ntls", {"server_name": "other.example"}, "certificate not accepted"),
        ("opportunistic", OFFERS_TLS + "S: 220 go\nS: 250 injected\nhang", {}, "between STARTTLS and the handshake"),
        ("opportunistic", OFFERS_TLS + "S: 220 go\nraw 250 inj\nhang", {}, "TLS|between"),
        ("opportunistic", OFFERS_TLS + "S: 220 go\nclose", {}, "during the TLS handshake"),
        ("opportunistic", OFFERS_TLS + "S: 220 go\nread 9\nraw no TLS here at all\nhang", {}, "TLS"),
        ("required", OFFERS_TLS + "S: 220 go\nwait", {"greeting_timeout": 0.2}, "handshake took too long"),
    ],
)
async def test_tls_that_fails_is_never_gone_without(
    peers: Peers, opened: Opened, ca_file: str, policy: str, dialogue: str, settings: dict[str, Any], reason: str
) -> None:
    refuse = await opened(pool_of(await peers(dialogue), tls=policy, **{"ca_file": ca_file, **settings}))
    assert isinstance(refuse, Refuse)
    assert any(part in refuse.log for part in reason.split("|")), refuse.log
    await ended()


@pytest.mark.parametrize("settings", [{}, {"server_name": "mx.example"}])
async def test_implicit_tls_is_verified(
    peers: Peers, opened: Opened, ca_file: str, settings: dict[str, Any]
) -> None:
    peer = await peers(GOOD, implicit_tls=True)
    connection = await opened(pool_of(peer, ca_file=ca_file, **settings))
    assert isinstance(connection, Connection), connection
    assert connection.tls and connection.encrypted
    refuse = await opened(pool_of(peer))
    assert isinstance(refuse, Refuse) and "certificate not accepted" in refuse.log
    await ended(connection)


async def test_a_unix_socket_is_local(peers: Peers, opened: Opened, tmp_path: Path) -> None:
    connection = await opened(pool_of(await peers(GOOD, path=str(tmp_path / "mta"))))
    assert isinstance(connection, Connection)
    assert connection.local and connection.address == ("unix:", 0)
    await ended(connection)


# --- stages


async def test_the_order_of_the_prelude(peers: Peers, opened: Opened) -> None:
    def proxy(session: Session, peer: Connection) -> None:
        peer.write(b"PROXY UNKNOWN\r\n")

    async def xclient(session: Session, peer: Connection) -> None:
        assert peer.extensions == {"XCLIENT": "ADDR"}
        assert (await peer.command(f"XCLIENT ADDR={session.client.address}".encode())).code == 220
        peer.identified()
        await peer.hello("client.example")

    async def login(session: Session, peer: Connection) -> None:
        await peer.command(b"AUTH PLAIN AGEAYg==", secret=True)

    peer = await peers(
        "C: PROXY UNKNOWN\nS: 220 mx\nC: EHLO gw.example\nS: 250-mx\nS: 250 XCLIENT ADDR\n"
        "C: XCLIENT ADDR=192.0.2.7\nS: 220 mx\nC: EHLO client.example\nS: 250-mx\nS: 250 DSN\n"
        "C: AUTH PLAIN AGEAYg==\nS: 235 in" + QUIT
    )
    pool = pool_of(peer)
    connection = await opened(pool, Hooks(upstream_connect=proxy, upstream_ready=xclient, upstream_login=login))
    assert isinstance(connection, Connection), connection
    assert connection.extensions == {"DSN": ""} and not connection.reusable
    assert pool.profile() == {"XCLIENT": "ADDR"}, "in the gateway's own state"
    await ended(connection)


REFUSAL = Refuse(Cause.UPSTREAM_MISCONFIGURED, log="mend it")


@pytest.mark.parametrize("phase", ["upstream_ready", "upstream_login"])
async def test_a_refusal_of_a_stage_is_final(peers: Peers, opened: Opened, phase: str) -> None:
    async def refuse(session: Session, peer: Connection) -> Refuse:
        return REFUSAL

    pool = pool_of(await peers(GOOD), await peers(GOOD))
    assert await opened(pool, Hooks(5.0, "tempfail", **{phase: refuse})) is REFUSAL
    await ended()
    assert [server.active for server in pool.servers] == [0, 0]


async def test_a_refusal_before_the_conversation_says_nothing(peers: Peers, opened: Opened) -> None:
    pool = pool_of(await peers("hang"))
    assert await opened(pool, Hooks(upstream_connect=lambda session, peer: REFUSAL)) is REFUSAL
    assert pool.servers[0].active == 0


@pytest.mark.parametrize("phase", ["upstream_connect", "upstream_ready", "upstream_login"])
async def test_a_stage_that_raises_is_a_temporary_refusal(peers: Peers, opened: Opened, phase: str) -> None:
    def fail(session: Session, peer: Connection) -> None:
        raise ZeroDivisionError("oh")

    pool = pool_of(await peers("hang" if phase == "upstream_connect" else GOOD))
    refuse = await opened(pool, Hooks(5.0, "tempfail", **{phase: fail}))
    assert isinstance(refuse, Refuse)
    assert (refuse.cause, refuse.temporary) == (Cause.STAGE_FAILED, True)
    assert "ZeroDivisionError" in refuse.log
    await ended()
    assert pool.servers[0].active == 0


@pytest.mark.parametrize(
    ("on_error", "temporary", "disconnect"), [("reject", False, False), ("disconnect", True, True)]
)
async def test_a_stage_that_fails_has_the_verdict_its_configuration_says(
    peers: Peers, opened: Opened, on_error: str, temporary: bool, disconnect: bool
) -> None:
    """Promise 4."""

    def fail(session: Session, peer: Connection) -> None:
        raise ZeroDivisionError("oh")

    refuse = await opened(pool_of(await peers(GOOD)), Hooks(on_error=on_error, upstream_ready=fail))
    assert isinstance(refuse, Refuse) and (refuse.temporary, refuse.disconnect) == (temporary, disconnect)
    await ended()


async def test_a_stage_that_hangs_is_cut_off(peers: Peers, opened: Opened) -> None:
    async def hang(session: Session, peer: Connection) -> None:
        await asyncio.Event().wait()

    refuse = await opened(pool_of(await peers(GOOD)), Hooks(timeout=0.01, upstream_ready=hang))
    assert isinstance(refuse, Refuse) and refuse.cause is Cause.STAGE_FAILED and "time-out" in refuse.log
    await ended()


async def test_a_server_that_breaks_off_in_a_stage_is_replaced_and_not_ejected(peers: Peers, opened: Opened) -> None:
    async def noop(session: Session, peer: Connection) -> None:
        await peer.command(b"NOOP")

    pool = pool_of(await peers(READY + "\nC: NOOP\nclose"), await peers(READY + "\nC: NOOP\nS: 250 ok" + QUIT))
    connection = await opened(pool, Hooks(upstream_ready=noop))
    assert isinstance(connection, Connection) and connection.server is pool.servers[1]
    assert [(server.active, server.failures) for server in pool.servers] == [(0, 0), (1, 0)]
    await ended(connection)


async def test_a_refused_hello_of_a_stage_is_no_connection(peers: Peers, opened: Opened) -> None:
    async def hello(session: Session, peer: Connection) -> None:
        await peer.hello("client")

    peer = await peers(READY + "\nC: EHLO client\nS: 450 later" + QUIT)
    refuse = await opened(pool_of(peer), Hooks(upstream_ready=hello))
    assert isinstance(refuse, Refuse) and refuse.cause is Cause.UPSTREAM_DOWN
    await ended()


@pytest.mark.parametrize(
    ("greeting", "verdict"), [("554 5.7.1 listed", True), ("421 too many from you", False), ("450 later", False)]
)
async def test_behind_proxy_a_greeting_may_mean_the_client(
    peers: Peers, opened: Opened, greeting: str, verdict: bool
) -> None:
    peer = await peers(f"C: PROXY UNKNOWN\nS: {greeting}\nhang")
    pool = pool_of(peer)
    refuse = await opened(pool, Hooks(upstream_connect=lambda session, peer: peer.write(b"PROXY UNKNOWN\r\n")))
    assert isinstance(refuse, Refuse)
    assert refuse.reply == (Reply(554, (b"5.7.1 listed",)) if verdict else None)
    assert pool.servers[0].failures == 0
    await ended()


# --- reuse

MAIL = "\nC: MAIL FROM:<>\nS: 250 ok\nC: DATA\nS: 354 go\nC: .\nS: 250 queued"


async def send_mail(connection: Connection | Refuse) -> Connection:
    assert isinstance(connection, Connection)
    await connection.mail(b"MAIL FROM:<>")
    await connection.command(b"DATA")
    connection.wire.write(b".\r\n")
    await connection.reply()
    return connection


async def test_a_connection_that_spoke_for_nobody_is_used_again(peers: Peers, opened: Opened) -> None:
    peer = await peers(READY + MAIL + MAIL + QUIT)
    pool = pool_of(peer, reuse=True, reuse_transactions=2)
    first = await send_mail(await opened(pool))
    give_back(first)
    assert pool.servers[0].active == 0 and list(pool.servers[0].idle) == [first]
    again = await send_mail(await opened(pool))
    assert again is first and pool.servers[0].active == 1
    give_back(again)
    assert not pool.servers[0].idle, "as many messages as it may carry"
    await ended()
    assert peer.connections == 1


async def test_an_open_transaction_is_reset_before_the_next(peers: Peers, opened: Opened) -> None:
    peer = await peers(
        READY + "\nC: MAIL FROM:<>\nS: 250 ok\nC: RSET\nC: MAIL FROM:<a@b>\nS: 250 ok\nS: 250 ok" + QUIT
    )
    pool = pool_of(peer, reuse=True)
    connection = await opened(pool)
    assert isinstance(connection, Connection)
    await connection.mail(b"MAIL FROM:<>")
    connection.before_mail(b"XFORWARD ADDR=192.0.2.7")
    give_back(connection)
    again = await opened(pool)
    assert again is connection
    await connection.mail(b"MAIL FROM:<a@b>")
    await ended(connection)


@pytest.mark.parametrize("why", ["off", "identified", "refused", "not ok", "reply owed", "stop"])
async def test_connections_that_are_not_kept(peers: Peers, opened: Opened, why: str) -> None:
    talk = {"refused": "\nC: MAIL FROM:<>\nS: 550 no", "reply owed": "\nC: NOOP"}.get(why, "")
    pool = pool_of(await peers(READY + talk + QUIT), reuse=why != "off")
    connection = await opened(pool)
    assert isinstance(connection, Connection)
    if why == "identified":
        connection.identified()
    elif why == "refused":
        await connection.mail(b"MAIL FROM:<>")
    elif why == "reply owed":
        connection.send(b"NOOP\r\n")
    elif why == "stop":
        pool.close_idle()
    give_back(connection, ok=why != "not ok")
    assert not pool.servers[0].idle
    await ended()
    assert pool.servers[0].active == 0


@pytest.mark.parametrize("end", ["S: 421 idle too long\nhang", "close", "raw 2\nhang"])
async def test_a_server_that_ends_a_waiting_connection_costs_nobody_anything(
    peers: Peers, opened: Opened, end: str
) -> None:
    peer = await peers(READY + "\nwait\n" + end, GOOD)
    pool = pool_of(peer, reuse=True)
    stale = await opened(pool)
    assert isinstance(stale, Connection)
    give_back(stale)
    peer.go_on.set()
    if end == "close":
        await stale.wire.wait_readable()  # a FIN alone is found when the connection is to be used
    else:
        await asyncio.wait_for(peer.gone.wait(), 5)
    connection = await opened(pool)
    assert isinstance(connection, Connection) and connection is not stale
    assert pool.servers[0].active == 1 and pool.servers[0].failures == 0 and not pool.servers[0].idle
    await ended(connection)


async def test_a_waiting_connection_that_breaks_in_a_stage_is_replaced_by_a_new_one(
    peers: Peers, opened: Opened
) -> None:
    async def noop(session: Session, peer: Connection) -> None:
        await peer.command(b"NOOP")

    peer = await peers(READY + "\nC: NOOP\nS: 250 ok\nC: NOOP\nclose", READY + "\nC: NOOP\nS: 250 ok" + QUIT)
    pool = pool_of(peer, reuse=True)
    stale = await opened(pool, Hooks(upstream_ready=noop))
    assert isinstance(stale, Connection)
    give_back(stale)
    connection = await opened(pool, Hooks(upstream_ready=noop))
    assert isinstance(connection, Connection) and connection is not stale
    assert pool.servers[0].active == 1
    await ended(connection)
    assert pool.servers[0].active == 0


async def test_a_waiting_connection_is_ended_in_time_and_counts_for_the_limit(peers: Peers, opened: Opened) -> None:
    peer = await peers(GOOD, "C: PROXY UNKNOWN\n" + GOOD, GOOD)
    pool = pool_of(peer, reuse=True, max_connections=1)
    give_back(await opened(pool))  # type: ignore[arg-type]
    proxied = await opened(pool, Hooks(upstream_connect=lambda session, peer: peer.write(b"PROXY UNKNOWN\r\n")))
    assert isinstance(proxied, Connection) and not pool.servers[0].idle
    await ended(proxied)
    pool.settings = replace(pool.settings, reuse_idle=0.001)
    give_back(await opened(pool))  # type: ignore[arg-type]
    assert len(pool.servers[0].idle) == 1
    peer.gone.clear()
    await asyncio.wait_for(peer.gone.wait(), 5)
    assert not pool.servers[0].idle
    await ended()


async def test_a_stop_ends_waiting_connections(peers: Peers, opened: Opened) -> None:
    pool = pool_of(await peers(GOOD), reuse=True)
    connection = await opened(pool)
    assert isinstance(connection, Connection)
    give_back(connection)
    timer = connection.idle_timer
    pool.close_idle()
    await ended()
    assert connection.wire.closed and timer is not None and timer.cancelled()


# --- mail stores

IMAP = "S: * OK [CAPABILITY SASL-IR ID AUTH=PLAIN AUTH=XOAUTH2 AUTH=OAUTHBEARER] ready\n"
POP3 = "S: +OK ready\nC: CAPA\nS: +OK\nS: USER\nS: .\n"


async def log_in(peer: Any, session: Session, **options: Any) -> Any:
    pool = pool_of(peer.url, assume=options.pop("assume", None))
    chain: Any = options.pop("hooks", None) or Hooks()
    result = await open_upstream(session, pool, chain, hostname="gw.example", **options)
    if isinstance(result, Refuse):
        await quits_done()
        assert pool.servers[0].active == 0
    return result


def of(session: Session, protocol: str, password: str | None = "tanstaaf", token: str | None = None) -> Session:
    session.protocol, session.typed_user, session.password, session.token = protocol, "tim", password, token
    session.tag, session.auth_mechanism = b"a1", "XOAUTH2" if token else "PLAIN"
    return session


async def test_the_client_is_logged_in_under_its_own_tag(peers: Peers, new_session: NewSession) -> None:
    peer = await peers(IMAP + 'C: a1 LOGIN "tim" "tanstaaf"\nS: * CAPABILITY IDLE\nS: a1 OK in\nC: g1 LOGOUT', scheme="imap")
    opened = await log_in(peer, of(new_session(), "imap"))
    assert opened.logged_in and opened.login_answer == b"* CAPABILITY IDLE\r\na1 OK in\r\n"
    give_back(opened)
    await quits_done()
    peer = await peers(POP3 + "C: USER tim\nS: +OK\nC: PASS tanstaaf\nS: +OK 2 messages\nC: QUIT", scheme="pop3")
    opened = await log_in(peer, of(new_session(), "pop3"))
    assert opened.login_answer == b"+OK 2 messages\r\n"
    opened.end_quietly()
    await quits_done()


async def test_a_token_goes_by_the_clients_mechanism(peers: Peers, new_session: NewSession) -> None:
    message = "dXNlcj10aW0BYXV0aD1CZWFyZXIgeWEyOS50b2tlbgEB"
    peer = await peers(IMAP + f"C: a1 AUTHENTICATE XOAUTH2 {message}\nS: a1 OK in", scheme="imap")
    opened = await log_in(peer, of(new_session(), "imap", None, "ya29.token"))
    assert opened.logged_in
    opened.abort()
    peer = await peers(IMAP + f"C: a1 AUTHENTICATE XOAUTH2 {message}\nS: + e30=\nC: \nS: a1 NO no\nhang", scheme="imap")
    refuse = await log_in(peer, of(new_session(), "imap", None, "ya29.token"))
    assert refuse.cause is Cause.LOGIN_REFUSED and "ya29" not in refuse.log


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ("a1 NO [AUTHENTICATIONFAILED] wrong", Cause.LOGIN_REFUSED),
        ("a1 NO [UNAVAILABLE] later", Cause.AUTH_UNAVAILABLE),
        ("a1 NO [PRIVACYREQUIRED] not in clear", Cause.AUTH_UNAVAILABLE),
        ("a1 BAD what", Cause.AUTH_UNAVAILABLE),
        ("* BYE later", Cause.AUTH_UNAVAILABLE),
    ],
)
@pytest.mark.parametrize("passing", [False, True])
async def test_a_store_that_refuses(
    peers: Peers, new_session: NewSession, answer: str, cause: Cause, passing: bool
) -> None:
    peer = await peers(IMAP + f'C: a1 LOGIN "tim" "tanstaaf"\nS: {answer}\nhang', scheme="imap")
    messages: Any = "always" if passing else "auto"
    refuse = await log_in(peer, of(new_session(), "imap"), pass_error_message=messages)
    assert isinstance(refuse, Refuse) and refuse.cause is cause
    assert (refuse.reply is not None) is passing
    if refuse.reply is not None:
        assert refuse.reply.text == answer.split(" ", 2)[2]
    assert answer.split(" ", 2)[2] in refuse.log and "tanstaaf" not in refuse.log


@pytest.mark.parametrize(
    ("cause", "messages", "answered", "passed"),
    [
        (Cause.AUTH_FAILED, "auto", Cause.AUTH_FAILED, False),
        (Cause.AUTH_FAILED, "always", Cause.LOGIN_REFUSED, True),
        (Cause.AUTH_FAILED, "never", Cause.LOGIN_REFUSED, False),
        (Cause.AUTH_UNAVAILABLE, "auto", Cause.AUTH_UNAVAILABLE, False),
        (Cause.POLICY, "auto", Cause.POLICY, True),  # a verdict on the client
        (Cause.POLICY, "always", Cause.UPSTREAM_DOWN, True),
        (Cause.POLICY, "never", Cause.UPSTREAM_DOWN, False),
        (Cause.UPSTREAM_MISCONFIGURED, "auto", Cause.UPSTREAM_MISCONFIGURED, False),
        (Cause.UPSTREAM_MISCONFIGURED, "always", Cause.UPSTREAM_DOWN, True),
    ],
)
async def test_whose_words_a_client_reads(
    peers: Peers, new_session: NewSession, cause: Cause, messages: Any, answered: Cause, passed: bool
) -> None:
    async def stage(session: Session, peer: Any) -> Refuse:
        return Refuse(cause, reply=Reply.of("535 5.7.8 no"))

    refuse = await log_in(
        await peers(GOOD), new_session(), hooks=Hooks(upstream_login=stage), pass_error_message=messages
    )
    assert refuse.cause is answered and (refuse.reply is not None) is passed


@pytest.mark.parametrize(
    ("user", "password", "cause"),
    [
        ("tim", None, Cause.AUTH_UNAVAILABLE),
        ("", None, Cause.AUTH_UNAVAILABLE),
        ("tim", "x\r\na2 LOGOUT", Cause.AUTH_FAILED),
        ("tim\0", "x", Cause.AUTH_FAILED),
    ],
)
async def test_nothing_is_said_without_what_it_takes(
    peers: Peers, new_session: NewSession, user: str, password: str | None, cause: Cause
) -> None:
    for protocol, dialogue in (("imap", IMAP + "C: g1 LOGOUT"), ("pop3", POP3 + "C: QUIT")):
        session = of(new_session(), protocol, password)
        session.typed_user = user
        refuse = await log_in(await peers(dialogue, scheme=protocol), session)
        assert isinstance(refuse, Refuse) and refuse.cause is cause
        await quits_done()


async def test_clear_text_over_the_network(
    peers: Peers, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.upstream.connection.UpstreamConnection.local", property(lambda self: False))
    peer = await peers(IMAP + "C: g1 LOGOUT", IMAP + 'C: a1 LOGIN "tim" "tanstaaf"\nS: a1 OK in', scheme="imap")
    pool = pool_of(peer.url)
    refuse = await open_upstream(of(new_session(), "imap"), pool, Hooks(), hostname="gw")  # type: ignore[arg-type]
    assert isinstance(refuse, Refuse) and refuse.cause is Cause.UPSTREAM_MISCONFIGURED and "clear text" in refuse.log
    await quits_done()
    pool = pool_of(peer.url, allow_plaintext_login=True)
    opened = await open_upstream(of(new_session(), "imap"), pool, Hooks(), hostname="gw")  # type: ignore[arg-type]
    assert not isinstance(opened, Refuse) and opened.logged_in
    opened.abort()


async def test_who_relays_a_login_finds_nobody_logged_in(peers: Peers, new_session: NewSession) -> None:
    asked: list[str] = []

    async def ready(session: Session, peer: Any) -> None:
        asked.append("ready")

    async def stage(session: Session, peer: Any) -> None:
        asked.append("login")

    hooks = Hooks(upstream_ready=ready, upstream_login=stage)
    peer = await peers(IMAP + "C: a1 AUTHENTICATE SCRAM-SHA-1 bg==\nS: a1 OK in", scheme="imap")
    opened = await log_in(peer, of(new_session(), "imap", None), hooks=hooks, login=False)
    assert not opened.logged_in and asked == ["ready"]
    step = await opened.sasl("SCRAM-SHA-1", b"n")
    assert step.reply.code == 235 and opened.login_answer == b"a1 OK in\r\n"
    opened.abort()


async def test_a_stage_that_logged_in_has_done_it(peers: Peers, new_session: NewSession) -> None:
    async def stage(session: Session, peer: Any) -> None:
        await peer.login(b"fixed", b"word")

    peer = await peers(IMAP + 'C: a1 LOGIN "fixed" "word"\nS: a1 OK in', scheme="imap")
    opened = await log_in(peer, of(new_session(), "imap"), hooks=Hooks(upstream_login=stage))
    assert opened.logged_in
    opened.abort()


async def test_a_store_that_breaks_off_is_replaced(peers: Peers, new_session: NewSession) -> None:
    bad = await peers(IMAP + 'C: a1 LOGIN "tim" "tanstaaf"\nclose', scheme="imap")
    good = await peers(IMAP + 'C: a1 LOGIN "tim" "tanstaaf"\nS: a1 OK in', scheme="imap")
    pool = pool_of(bad.url, good.url)
    opened = await open_upstream(of(new_session(), "imap"), pool, Hooks(), hostname="gw")  # type: ignore[arg-type]
    assert not isinstance(opened, Refuse) and opened.server is pool.servers[1]
    opened.abort()
