from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from gateway.observe.transcript import Transcript
from gateway.protocol.errors import LocalError
from gateway.stage import Peer as StagePeer
from gateway.upstream.connection import UpstreamError, quits_done
from gateway.upstream.dial import ClientRefused, LoopDetected, dial
from gateway.upstream.pool import Pool, PoolSettings
from gateway.upstream.probe import Health, learn, probe_server
from gateway.upstream.server import Server

pytestmark = pytest.mark.anyio

PLAIN = b64encode(b"\0tim\0tanstaaf").decode()
TIM, WORD = b"tim", b"tanstaaf"
IMAP = "S: * OK [CAPABILITY IMAP4rev1 SASL-IR LITERAL+ ID AUTH=PLAIN AUTH=XOAUTH2] ready"
ASKED = "S: * OK ready\nC: g1 CAPABILITY\nS: * CAPABILITY IMAP4rev1 IDLE\nS: g1 OK done"
POP3 = "S: +OK ready\nC: CAPA\nS: +OK\nS: USER\nS: SASL PLAIN XOAUTH2\nS: ."
Connect = Callable[..., Awaitable[Any]]


@pytest.fixture(autouse=True)
async def all_quits_are_done() -> AsyncIterator[None]:
    yield
    await quits_done()


@pytest.fixture
def connected(peers: Callable[..., Awaitable[Any]]) -> Connect:
    """Dial a peer that plays the dialogue, with these settings of the pool."""

    async def connect(dialogue: str, scheme: str = "imap", instance: str = "", **settings: Any) -> Any:
        peer = await peers(dialogue, scheme=scheme.removesuffix("s"), implicit_tls=scheme.endswith("s"))
        known = PoolSettings(**settings)
        return await dial(Server(peer.url), known, hostname="gw.example", instance=instance)

    return connect


@pytest.mark.parametrize(
    ("scheme", "dialogue", "extensions"),
    [
        ("imap", IMAP, {"IMAP4REV1": "", "SASL-IR": "", "LITERAL+": "", "ID": "", "AUTH": "PLAIN XOAUTH2"}),
        ("imap", ASKED, {"IMAP4REV1": "", "IDLE": ""}),
        ("imap", "S: * OK x\nC: g1 CAPABILITY\nS: * OK hi\nS: * CAPABILITY IMAP4rev1\nS: g1 OK x", {"IMAP4REV1": ""}),
        ("imap", "S: * OK x\nC: g1 CAPABILITY\nS: g1 OK [CAPABILITY ID] x", {}),
        ("imap", "S: * OK x\nC: g1 CAPABILITY\nS: g1 BAD what", {}),
        ("imap", "raw * OK x\\n\nC: g1 CAPABILITY\nraw * CAPABILITY A\\ng1 OK\\n", {"A": ""}),
        ("pop3", POP3, {"USER": "", "SASL": "PLAIN XOAUTH2"}),
        ("pop3", "S: +OK ready\nC: CAPA\nS: -ERR what", {}),
        ("pop3", "S: +OK\nC: CAPA\nraw +OK\\r\\nTOP\\r\\n\nraw UIDL\\r\\n.\\r\\n", {"TOP": "", "UIDL": ""}),
    ],
)
async def test_what_is_announced(connected: Connect, scheme: str, dialogue: str, extensions: dict[str, str]) -> None:
    ours = sum(line[:4] in ("C: g", "C: C") for line in dialogue.split("\n"))
    farewell = f"\nC: g{ours + 1} LOGOUT\nS: * BYE" if scheme == "imap" else "\nC: QUIT\nS: +OK"
    connection = await connected(dialogue + farewell, scheme)
    peer: StagePeer = connection
    assert (peer.protocol, peer.extensions, peer.logged_in, peer.local, peer.takes_secrets) == (
        scheme, extensions, False, True, True,
    )  # fmt: skip
    assert connection.idle and connection.greeted and not connection.reusable
    await connection.quit()
    assert connection.wire.closed


@pytest.mark.parametrize(
    ("scheme", "dialogue", "kind"),
    [
        ("imap", "S: * PREAUTH you are root\nhang", "down"),
        ("imap", "S: * BYE go away\nhang", "down"),
        ("imap", "S: * BYE [UNAVAILABLE] later\nhang", "busy"),
        ("imap", "S: * CAPABILITY IMAP4rev1\nhang", "garbage"),
        ("imap", "S: + go on\nhang", "garbage"),
        ("imap", "S: g1 OK hello\nhang", "garbage"),
        ("imap", "S: 220 mx.example ESMTP\nhang", "garbage"),
        ("imap", "S: +OK pop3 here\nhang", "garbage"),
        ("imap", "raw " + "x" * 9000 + "\nhang", "garbage"),
        ("imap", "close", "lost"),
        ("imap", "hang", "timeout"),
        ("imap", "raw * OK unfin\nclose", "lost"),
        ("imap", "S: * OK x\nC: g1 CAPABILITY\nclose", "lost"),
        ("imap", "S: * OK x\nC: g1 CAPABILITY\nS: * BYE idle\nhang", "busy"),
        ("imap", "S: * OK x\nC: g1 CAPABILITY\nS: a7 OK of whom\nhang", "garbage"),
        ("imap", "S: * OK x\nC: g1 CAPABILITY\nraw * X {90000}\\r\\n\nhang", "garbage"),
        ("imap", "S: * OK x\nC: g1 CAPABILITY\nhang", "timeout"),
        ("pop3", "S: -ERR go away\nC: QUIT\nS: +OK", "down"),
        ("pop3", "S: -ERR [SYS/TEMP] later\nhang", "busy"),
        ("pop3", "S: + go on\nhang", "garbage"),
        ("pop3", "S: * OK imap here\nhang", "garbage"),
        ("pop3", "S: +OK\nC: CAPA\nraw +OK\\r\\nTOP\\r\\n\nclose", "lost"),
        ("pop3", "S: +OK\nC: CAPA\nraw +OK\\r\\n\nhang", "timeout"),
    ],
)
async def test_servers_that_are_none(connected: Connect, scheme: str, dialogue: str, kind: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        await connected(dialogue, scheme, greeting_timeout=0.1 if kind == "timeout" else 30.0)
    assert caught.value.kind == kind


@pytest.mark.parametrize(("scheme", "greeting"), [("imap", "* OK gw f00d ready"), ("pop3", "+OK gw f00d ready")])
async def test_our_own_greeting_is_a_loop(connected: Connect, scheme: str, greeting: str) -> None:
    with pytest.raises(LoopDetected):
        await connected(f"S: {greeting}\nhang", scheme, instance="f00d")


@pytest.mark.parametrize(
    ("scheme", "dialogue"), [("imap", "read 8\nS: * BYE no\nhang"), ("pop3", "read 8\nS: -ERR no\nC: QUIT")]
)
async def test_a_refusal_after_a_proxy_header_is_the_clients(peers: Connect, scheme: str, dialogue: str) -> None:
    peer = await peers(dialogue, scheme=scheme)
    with pytest.raises(ClientRefused) as caught:
        await dial(Server(peer.url), PoolSettings(), hostname="gw", preface=lambda c: c.write(b"PROXY x\n"))
    assert (caught.value.reply.code, caught.value.reply.text) == (554, "no")


STARTTLS = {
    "imap": "S: * OK [CAPABILITY STARTTLS LOGINDISABLED] x\nC: g1 STARTTLS\n",
    "pop3": "S: +OK\nC: CAPA\nS: +OK\nS: STLS\nS: .\nC: STLS\n",
}
GO = {"imap": "g1 OK go", "pop3": "+OK go"}


@pytest.mark.parametrize(
    ("scheme", "behind"),
    [("imap", "C: g2 CAPABILITY\nS: * CAPABILITY NEW\nS: g2 OK x"), ("pop3", "C: CAPA\nS: +OK\nS: NEW\nS: .")],
)
async def test_after_tls_everything_is_asked_anew(connected: Connect, ca_file: str, scheme: str, behind: str) -> None:
    tls = STARTTLS[scheme] + f"S: {GO[scheme]}\ntls\n{behind}"
    connection = await connected(tls, scheme, tls="required", ca_file=ca_file)
    assert connection.tls and connection.encrypted and connection.extensions == {"NEW": ""}
    connection.abort()
    connection = await connected(tls, scheme)
    assert not connection.tls and connection.encrypted, "opportunistic: not verified"
    connection.abort()


@pytest.mark.parametrize("scheme", ["imap", "pop3"])
@pytest.mark.parametrize(
    ("answer", "kind"), [("{go}\\r\\n* OK injected\\r\\n", "tls"), ("{go}\\r\\n+OK", "tls"), ("{no}\\r\\n", "tls")]
)
async def test_starttls_that_fails(connected: Connect, scheme: str, answer: str, kind: str) -> None:
    said = answer.format(go=GO[scheme], no={"imap": "g1 NO x", "pop3": "-ERR x"}[scheme])
    quit_ = {"imap": "C: g2 LOGOUT", "pop3": "C: QUIT"}[scheme] if "{no}" in answer else "hang"
    with pytest.raises(UpstreamError) as caught:
        await connected(f"{STARTTLS[scheme]}raw {said}\n{quit_}", scheme, tls="required", verify=False)
    assert caught.value.kind == kind


async def test_implicit_tls_and_what_is_not_offered(connected: Connect, ca_file: str) -> None:
    connection = await connected(IMAP, "imaps", ca_file=ca_file)
    assert connection.tls and connection.protocol == "imap"
    connection.abort()
    connection = await connected(POP3, "pop3s", verify=False)
    assert connection.tls
    connection.abort()
    with pytest.raises(UpstreamError, match="STLS is not offered"):
        await connected(POP3 + "\nC: QUIT\nS: +OK", "pop3", tls="required", verify=False)


@pytest.mark.parametrize(
    ("scheme", "assume", "dialogue"),
    [
        ("imap", (), "S: * OK [CAPABILITY AUTH=PLAIN] x\nC: g1 LOGIN {3}\nS: + ok\nC: tim {8}\nS: + ok\nC: tanstaaf"),
        ("imap", ("LITERAL+",), 'S: * OK x\nC: g1 LOGIN "tim" "tanstaaf"'),
        ("imap", ("LOGINDISABLED", "AUTH=PLAIN SASL-IR"), "S: * OK x\nC: g1 AUTHENTICATE PLAIN\nS: +\nC: " + PLAIN),
        ("pop3", (), "S: +OK\nC: USER tim\nS: +OK\nC: PASS tanstaaf"),
        ("pop3", ("SASL PLAIN",), "S: +OK\nC: AUTH PLAIN " + PLAIN),
    ],
)
async def test_assumed_capabilities_are_believed_and_nothing_is_asked(
    connected: Connect, scheme: str, assume: tuple[str, ...], dialogue: str
) -> None:
    connection = await connected(f"{dialogue}\nS: {'g1 OK' if scheme == 'imap' else '+OK'} in", scheme, assume=assume)
    assert (await connection.login(TIM, WORD)).reply_class == 2
    connection.abort()


@pytest.mark.parametrize(
    ("user", "password", "capabilities", "said"),
    [
        (b"tim", b"tanstaaf", "X", 'C: a.1 LOGIN "tim" "tanstaaf"'),
        (b'a"b', b"c\\d e", "X", 'C: a.1 LOGIN "a\\"b" "c\\\\d e"'),
        ("tím".encode(), b"x", "X", "C: a.1 LOGIN {4}\nS: + go\nread 10"),
        ("tím".encode(), "ß".encode(), "X", "C: a.1 LOGIN {4}\nS: + go\nread 10\nS: +\nread 4"),
        ("tím".encode(), "ß".encode(), "LITERAL+", "C: a.1 LOGIN {4+}\nread 11\nread 4"),
        (b"tim", "ß".encode(), "LITERAL-", 'C: a.1 LOGIN "tim" {2+}\nread 4'),
        (b"tim", b"tanstaaf", "LOGINDISABLED AUTH=PLAIN SASL-IR", f"C: a.1 AUTHENTICATE PLAIN {PLAIN}"),
        (b"tim", b"tanstaaf", "LOGINDISABLED AUTH=PLAIN", f"C: a.1 AUTHENTICATE PLAIN\nS: + \nC: {PLAIN}"),
    ],
)
async def test_imap_logins(connected: Connect, user: bytes, password: bytes, capabilities: str, said: str) -> None:
    """Any number of untagged lines stands before the tagged one; all of it is for the client, as it came."""
    answer = "S: * OK note\nS: * CAPABILITY IMAP4rev1 IDLE\nraw * X {5}\\r\\n1\\r\\n23 y\\r\\na.1 OK [CAPABILITY A] in\\r\\n"
    behind = "* 3 EXISTS\\r\\n"
    connection = await connected(f"S: * OK [CAPABILITY {capabilities}] x\n{said}\n{answer}{behind}")
    connection.client_tag = b"a.1"
    reply = await connection.login(user, password)
    assert (reply.code, reply.lines) == (235 if "AUTH" in capabilities else 250, (b"[CAPABILITY A] in",))
    assert connection.login_answer == (
        b"* OK note\r\n* CAPABILITY IMAP4rev1 IDLE\r\n* X {5}\r\n1\r\n23 y\r\na.1 OK [CAPABILITY A] in\r\n"
    )
    assert connection.logged_in and connection.speaks_for_client
    await connection.wire.wait_readable()
    assert connection.wire.take() == b"* 3 EXISTS\r\n", "for whoever reads on"
    connection.abort()


LOGIN = '\nC: g1 LOGIN "tim" "tanstaaf"\n'


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [
        ("g1 NO [AUTHENTICATIONFAILED] wrong", 550, "[AUTHENTICATIONFAILED] wrong"),
        ("g1 NO [UNAVAILABLE] db", 450, "[UNAVAILABLE] db"),
        ("g1 no [inuse] x", 550, "[inuse] x"),
        ("g1 NO [IN-USE] x", 450, "[IN-USE] x"),
        ("g1 BAD what", 500, "what"),
        ("* BYE [UNAVAILABLE] leaving", 421, "[UNAVAILABLE] leaving"),
        ("g1 NO tanstaaf is wrong", 550, "[removed] is wrong"),
    ],
)
async def test_imap_refusals(connected: Connect, answer: str, code: int, text: str) -> None:
    connection = await connected(f"{IMAP}{LOGIN}S: {answer}\nhang")
    reply = await connection.login(TIM, WORD)
    assert (reply.code, reply.text) == (code, text)
    assert not connection.logged_in and connection.login_answer == b"" and connection.closing is (code == 421)
    connection.abort()


@pytest.mark.parametrize(
    ("dialogue", "kind"),
    [
        (IMAP + LOGIN + "close", "lost"),
        (IMAP + LOGIN + "S: * OK wait\nclose", "lost"),
        (IMAP + LOGIN + "S: what?\nhang", "garbage"),
        (IMAP + LOGIN + "S: + more\nhang", "garbage"),
        (IMAP + LOGIN + "S: g7 OK in\nhang", "garbage"),
        (IMAP + LOGIN + "raw " + "* OK wait\\r\\n" * 6000 + "\nhang", "garbage"),
        (IMAP + LOGIN + "hang", "timeout"),
        (ASKED + "\nC: g2 LOGIN {4}\nclose", "lost"),
        (POP3 + "\nC: USER tim\nclose", "lost"),
        (POP3 + "\nC: USER tim\nS: +OK\nC: PASS tanstaaf\nclose", "lost"),
        (POP3 + "\nC: USER tim\nS: what?\nhang", "garbage"),
        (POP3 + "\nC: USER tim\nS: +OK\nS: +OK\nhang", "garbage"),
        (POP3 + "\nC: USER tim\nS: +OK\nC: PASS tanstaaf\nhang", "timeout"),
    ],
)
async def test_logins_that_break_off(connected: Connect, dialogue: str, kind: str) -> None:
    scheme = "pop3" if dialogue.startswith(POP3) else "imap"
    connection = await connected(dialogue, scheme, command_timeout=0.1 if kind == "timeout" else 30.0)
    user = "tím".encode() if "{4}" in dialogue else TIM
    with pytest.raises(UpstreamError) as caught:
        await connection.login(user, WORD)
    assert caught.value.kind == kind and "tanstaaf" not in str(caught.value)
    assert connection.closing and not connection.logged_in
    with pytest.raises(UpstreamError):
        await connection.command(b"NOOP")
    connection.end_quietly()
    assert connection.wire.transport.is_closing()


@pytest.mark.parametrize(
    ("dialogue", "code", "text"),
    [
        (POP3 + "\nC: USER tim\nS: +OK\nC: PASS tan  staaf \nS: +OK in", 250, "in"),
        (POP3 + "\nC: USER tim\nS: -ERR [AUTH] nobody", 550, "[AUTH] nobody"),
        (POP3 + "\nC: USER tim\nS: +OK\nC: PASS tan  staaf \nS: -ERR [IN-USE] locked", 450, "[IN-USE] locked"),
        (POP3 + "\nC: USER tim\nS: +OK\nC: PASS tan  staaf \nS: -ERR [SYS/TEMP] x", 450, "[SYS/TEMP] x"),
    ],
)
async def test_pop3_logins(connected: Connect, dialogue: str, code: int, text: str) -> None:
    connection = await connected(dialogue + "\nhang", "pop3")
    reply = await connection.login(TIM, b"tan  staaf ")
    assert (reply.code, reply.text) == (code, text)
    assert connection.login_answer == (b"+OK in\r\n" if code == 250 else b"")
    connection.abort()


async def test_pop3_without_user_takes_sasl(connected: Connect) -> None:
    capa = "S: +OK\nC: CAPA\nS: +OK\nS: SASL PLAIN\nS: ."
    connection = await connected(f"{capa}\nC: AUTH PLAIN {PLAIN}\nS: +OK in", "pop3")
    assert (await connection.login(TIM, WORD)).code == 235 and connection.login_answer == b"+OK in\r\n"
    connection.abort()
    long = b"p" * 300
    encoded = b64encode(b"\0tim\0" + long).decode()
    connection = await connected(f"{capa}\nC: AUTH PLAIN\nS: + \nC: {encoded}\nS: -ERR no", "pop3")
    assert (await connection.login(TIM, long)).code == 535 and not connection.logged_in
    connection.abort()


async def test_no_password_where_login_is_disabled(connected: Connect) -> None:
    connection = await connected("S: * OK [CAPABILITY LOGINDISABLED AUTH=GSSAPI] x\nC: g1 LOGOUT\nS: * BYE")
    assert (await connection.login(TIM, WORD)).code == 504
    await connection.quit()


@pytest.mark.parametrize("scheme", ["imap", "pop3", "smtp"])
@pytest.mark.parametrize("bad", [b"x\r\nevil", b"x\ny", b"x\r", b"x\0y"])
async def test_credentials_never_inject_commands(connected: Connect, scheme: str, bad: bytes) -> None:
    smtp = "S: 220 x\nC: EHLO gw.example\nS: 250-x\nS: 250 AUTH PLAIN"
    dialogue = {"imap": IMAP, "pop3": POP3, "smtp": smtp}[scheme]
    connection = await connected(dialogue + {"imap": "\nC: g1 LOGOUT\nS: * BYE"}.get(scheme, "\nC: QUIT"), scheme)
    for user, password in ((bad, WORD), (TIM, bad)):
        with pytest.raises(LocalError) as caught:
            await connection.login(user, password)
        assert "evil" not in str(caught.value)
    with pytest.raises(LocalError):
        await connection.command(bad)
    with pytest.raises(LocalError):
        await connection.sasl(bad.decode(), None)
    await connection.quit()


SASL = {
    "smtp": ("S: 220 x\nC: EHLO gw.example\nS: 250 x\n", "AUTH", "334 ", "235 in", "535 no", "501 off"),
    "imap": (IMAP + "\n", "t1 AUTHENTICATE", "+ ", "t1 OK in", "t1 NO no", "t1 BAD off"),
    "pop3": (POP3 + "\n", "AUTH", "+ ", "+OK in", "-ERR no", "-ERR off"),
}


@pytest.mark.parametrize("scheme", ["smtp", "imap", "pop3"])
async def test_sasl(connected: Connect, scheme: str) -> None:
    begin, verb, challenge, ok, *_ = SASL[scheme]
    secret = b64encode(b"secret-answer").decode()
    connection = await connected(
        f"{begin}C: {verb} SCRAM-SHA-1\nS: {challenge}{b64encode(b'r=1').decode()}\nC: {secret}\nS: {challenge}\nC: \nS: {ok}",
        scheme,
    )  # fmt: skip
    lines: list[str] = []
    connection.transcript = Transcript("7KQ2-M9", lines.append)
    connection.client_tag = b"t1"
    assert (await connection.sasl("scram-sha-1", None)).challenge == b"r=1"
    assert connection.in_exchange and not connection.idle
    assert (await connection.sasl_answer(b"secret-answer")).challenge == b""
    step = await connection.sasl_answer(b"")
    assert step.challenge is None and step.reply is not None and step.reply.code == 235
    assert connection.logged_in and connection.speaks_for_client and not connection.in_exchange
    assert secret not in "\n".join(lines) and "cj0x" not in "\n".join(lines)
    connection.abort()


@pytest.mark.parametrize("scheme", ["smtp", "imap", "pop3"])
async def test_sasl_with_an_initial_response(connected: Connect, scheme: str) -> None:
    begin, verb, challenge, ok, no, off = SASL[scheme]
    connection = await connected(f"{begin}C: {verb} PLAIN {PLAIN}\nS: {no} {PLAIN}\nC: {verb} EXTERNAL =\nS: {ok}", scheme)
    connection.client_tag = b"t1"
    step = await connection.sasl("PLAIN", b"\0tim\0tanstaaf")
    assert step.reply is not None and step.reply.code == 535 and step.reply.text == "no [removed]"
    assert not connection.logged_in
    step = await connection.sasl("EXTERNAL", b"")
    assert step.reply is not None and step.reply.code == 235
    connection.abort()
    connection = await connected(f"{begin}C: {verb} CRAM-MD5\nS: {challenge}YQ==\nC: *\nS: {off}", scheme)
    connection.client_tag = b"t1"
    await connection.sasl("CRAM-MD5", None)
    step = await connection.sasl_cancel()
    assert step.reply is not None and step.reply.code >= 500
    connection.abort()


@pytest.mark.parametrize("scheme", ["smtp", "imap", "pop3"])
async def test_a_long_initial_response_and_a_bad_challenge(connected: Connect, scheme: str) -> None:
    begin, verb, challenge, *_ = SASL[scheme]
    data = b"x" * (6200 if scheme == "imap" else 500)
    response = b64encode(data).decode()
    connection = await connected(
        f"{begin}C: {verb} XOAUTH2\nS: {challenge}\nC: {response}\nS: {challenge}%%%%x\nhang", scheme
    )
    connection.client_tag = b"t1"
    with pytest.raises(UpstreamError, match="base64"):
        await connection.sasl("XOAUTH2", data)
    connection.end_quietly()
    assert connection.wire.transport.is_closing()


@pytest.mark.parametrize("scheme", ["imap", "pop3"])
async def test_inside_an_exchange_nothing_else_is_said(connected: Connect, scheme: str) -> None:
    begin, verb, challenge, *_ = SASL[scheme]
    connection = await connected(f"{begin}C: {verb} LOGIN\nS: {challenge}VXNlcg==", scheme)
    connection.client_tag = b"t1"
    await connection.sasl("LOGIN", None)
    with pytest.raises(LocalError):
        await connection.command(b"NOOP")
    with pytest.raises(LocalError):
        connection.before_mail(b"XFORWARD A=1")
    connection.end_quietly()
    assert connection.wire.transport.is_closing(), "QUIT would be taken for an answer"


async def test_pop3_out_of_turn(connected: Connect) -> None:
    connection = await connected(POP3 + "\nS: +OK and more\nhang", "pop3")
    await connection.wire.wait_readable()
    with pytest.raises(UpstreamError, match="to nothing"):
        await connection.login(TIM, WORD)
    connection.abort()


async def test_the_transcript_and_the_repr_show_no_password(connected: Connect) -> None:
    lines: list[str] = []
    connection = await connected(IMAP + LOGIN + "S: * OK tanstaaf it is\nS: g1 OK hello tanstaaf")
    connection.transcript = Transcript("7KQ2-M9", lines.append)
    assert (await connection.login(TIM, WORD)).text == "hello [removed]"
    assert b"hello tanstaaf" in connection.login_answer, "the client reads what the server wrote, octet for octet"
    assert "U> [removed]" in lines and "tanstaaf" not in "\n".join(lines) + repr(connection)
    connection.abort()


PROBES = {"imap": IMAP + "\nC: g1 LOGOUT\nS: * BYE\nS: g1 OK", "pop3": POP3 + "\nC: QUIT\nS: +OK"}


@pytest.mark.parametrize("scheme", ["imap", "pop3"])
async def test_probes_and_profiles(peers: Connect, scheme: str) -> None:
    peer = await peers(PROBES[scheme], scheme=scheme)
    profile = await probe_server(Server(peer.url), PoolSettings(), hostname="gw.example")
    assert profile.greeting.code == 220 and "XOAUTH2" in str(profile.ehlo.keywords)
    other = await peers(PROBES[scheme].replace(" AUTH=XOAUTH2", "").replace(" XOAUTH2", ""), scheme=scheme)
    pool = Pool("store", PoolSettings(servers=((peer.url, 1), (other.url, 1))))
    assert await learn(Health(pool, hostname="gw.example"), 5.0)
    profile_ = pool.profile()
    assert profile_ is not None and profile_["SASL" if scheme == "pop3" else "AUTH"] == "PLAIN"


async def test_without_health_checks_nobody_is_asked_until_somebody_wants_to_know(peers: Connect) -> None:
    peer = await peers(PROBES["imap"], scheme="imap")
    pool = Pool("store", PoolSettings(servers=((peer.url, 1),), health=False))
    health = Health(pool, hostname="gw.example")
    assert not await learn(health, 5.0) and peer.connections == 0
    health.start()
    assert not health._tasks
    assert await pool.learn() and peer.connections == 1
