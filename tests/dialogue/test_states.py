"""Every command in every state of an SMTP session: the table is the specification, and no pair is missing.

Each pair is played in a session of its own. A code with `!` ends the session, `.` is content of the message; after
all others the session goes on. What needs a second client, or none that speaks, stands below the table.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.frontend.smtp_verbs import VERBS
from tests.dialogue.obliging import Client, ObligingUpstream, between

TABLE = """
                connected helo ehlo tls tls_ehlo auth mail rcpt refused bdat done spam rset xclient content
EHLO_c          250       250  250  250 250      250  250  250  250     250  250  250  250  250     .
HELO_c          250       250  250  250 250      250  250  250  250     250  250  250  250  250     .
EHLO            501       501  501  501 501      501  501  501  501     501  501  501  501  501     .
HELO_two_words  501       501  501  501 501      501  501  501  501     501  501  501  501  501     .
MAIL            503       250  250  503 250      250  503  503  503     503  250  250  250  503     .
MAIL_bad        503       501  501  503 501      501  503  503  503     503  501  501  501  503     .
RCPT            503       503  503  503 503      503  250  250  250     503  503  503  503  503     .
RCPT_nobody     503       503  503  503 503      503  550  550  550     503  503  503  503  503     .
RCPT_bad        503       503  503  503 503      503  501  501  501     503  503  503  503  503     .
DATA            503       503  503  503 503      503  554  354  554     503  503  503  503  503     .
DATA_x          501       501  501  501 501      501  501  501  501     501  501  501  501  501     .
BDAT            503       503  503  503 503      503  554  250  554     250  503  503  503  503     .
BDAT_LAST       503       503  503  503 503      503  554  250  554     250  503  503  503  503     .
BDAT_x          501!      501! 501! 501! 501!    501! 501! 501! 501!    501! 501! 501! 501! 501!    .
RSET            250       250  250  250 250      250  250  250  250     250  250  250  250  250     .
RSET_x          501       501  501  501 501      501  501  501  501     501  501  501  501  501     .
NOOP            250       250  250  250 250      250  250  250  250     250  250  250  250  250     .
NOOP_x          250       250  250  250 250      250  250  250  250     250  250  250  250  250     .
VRFY            501       501  501  501 501      501  501  501  501     501  501  501  501  501     .
VRFY_x          252       252  252  252 252      252  252  252  252     252  252  252  252  252     .
EXPN_x          502       502  502  502 502      502  502  502  502     502  502  502  502  502     .
HELP            214       214  214  214 214      214  214  214  214     214  214  214  214  214     .
QUIT            221!      221! 221! 221! 221!    221! 221! 221! 221!    221! 221! 221! 221! 221!    .
STARTTLS        220       220  220  503 503      503  220  220  220     220  220  220  220  220     .
STARTTLS_x      501       501  501  503 503      503  501  501  501     501  501  501  501  501     .
AUTH            501       501  501  501 501      501  501  501  501     501  501  501  501  501     .
AUTH_UNKNOWN    503       503  530  503 504      503  503  503  503     503  530  530  530  503     .
AUTH_good       503       503  530  503 235      503  503  503  503     503  530  530  530  503     .
AUTH_wrong      503       503  530  503 535      503  503  503  503     503  530  530  530  503     .
AUTH_asks       503       503  530  503 334      503  503  503  503     503  530  530  530  503     .
XCLIENT         550       550  550  550 550      550  550  550  550     550  550  550  550  220     .
XCLIENT_bad     550       550  550  550 550      550  550  550  550     550  550  550  550  501     .
XFORWARD        502       502  502  502 502      502  502  502  502     502  502  502  502  502     .
BURL            502       502  502  502 502      502  502  502  502     502  502  502  502  502     .
ETRN            502       502  502  502 502      502  502  502  502     502  502  502  502  502     .
FOO             500       500  500  500 500      500  500  500  500     500  500  500  500  500     .
(nothing)       500       500  500  500 500      500  500  500  500     500  500  500  500  500     .
control         500       500  500  500 500      500  500  500  500     500  500  500  500  500     .
long            500       500  500  500 500      500  500  500  500     500  500  500  500  500     .
HTTP            554!      554! 554! 554! 554!    554! 554! 554! 554!    554! 554! 554! 554! 554!    .
header          554!      554! 554! 554! 554!    554! 554! 554! 554!    554! 554! 554! 554! 554!    .
bare_LF         500!      500! 500! 500! 500!    500! 500! 500! 500!    500! 500! 500! 500! 500!    -
"""

COMMANDS = {
    "EHLO_c": "EHLO client.test",
    "HELO_c": "HELO client.test",
    "HELO_two_words": "HELO two words",
    "MAIL": "MAIL FROM:<c@example.org>",
    "MAIL_bad": "MAIL FROM:<c@>",
    "RCPT": "RCPT TO:<c@example.org>",
    "RCPT_nobody": "RCPT TO:<nobody@example.org>",
    "RCPT_bad": "RCPT TO:<>",
    "BDAT": "BDAT 6\r\nQUIT",
    "BDAT_LAST": "BDAT 6 LAST\r\nQUIT",
    "AUTH_UNKNOWN": "AUTH GSSAPI",
    "AUTH_good": "AUTH PLAIN AHRpbQB0YW5zdGFhZg==",
    "AUTH_wrong": "AUTH PLAIN AHRpbQB3cm9uZw==",
    "AUTH_asks": "AUTH LOGIN",
    "XCLIENT": "XCLIENT ADDR=192.0.2.1",
    "XCLIENT_bad": "XCLIENT COLOR=red",
    "XFORWARD": "XFORWARD ADDR=192.0.2.1",
    "BURL": "BURL imap://example.org/ LAST",
    "ETRN": "ETRN example.org",
    "(nothing)": "",
    "control": "NOOP \0",
    "long": "NOOP " + "x" * 3000,
    "HTTP": "GET / HTTP/1.1",
    "header": "Subject: hello",
    "bare_LF": "NOOP\n",
}
STATES, *ROWS = (line.split() for line in TABLE.strip().splitlines())
EXPECTED = {(row[0], state): code for row in ROWS for state, code in zip(STATES, row[1:], strict=True)}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """uvloop: the transcripts play on both loops."""
    return "asyncio", {"use_uvloop": True}


async def reach(client: Client, state: str) -> None:
    """From the greeting to the state."""
    assert await client.code() == "220"
    before = {
        "connected": "",
        "helo": "HELO c",
        "ehlo": "EHLO c",
        "tls": "STARTTLS",
        "tls_ehlo": "STARTTLS|EHLO c",
        "auth": "STARTTLS|EHLO c|AUTH PLAIN AHRpbQB0YW5zdGFhZg==",
        "mail": "EHLO c|MAIL FROM:<a@example.org>",
        "rcpt": "EHLO c|MAIL FROM:<a@example.org>|RCPT TO:<b@example.org>",
        "refused": "EHLO c|MAIL FROM:<a@example.org>|RCPT TO:<nobody@example.org>",
        "bdat": "EHLO c|MAIL FROM:<a@example.org>|RCPT TO:<b@example.org>|BDAT 3\r\nx",
        "done": "EHLO c|MAIL FROM:<a@example.org>|RCPT TO:<b@example.org>|DATA|x\r\n.",
        "spam": "EHLO c|MAIL FROM:<spam@example.org>|RCPT TO:<b@example.org>|DATA|x\r\n.",
        "rset": "EHLO c|MAIL FROM:<a@example.org>|RCPT TO:<b@example.org>|RSET",
        "xclient": "EHLO c|XCLIENT ADDR=192.0.2.2",
        "content": "EHLO c|MAIL FROM:<a@example.org>|RCPT TO:<b@example.org>|DATA",
    }[state]
    for command in before.split("|") if before else ():
        code = await client.say(command)
        assert code in ("220", "235", "250", "354", "550" if state == "refused" else "554"), (state, command, code)
        if command == "STARTTLS":
            await client.start_tls()


async def result(client: Client, name: str, upstream: ObligingUpstream, state: str) -> str:
    """What the command brings, in the table's words."""
    command = COMMANDS.get(name, name.replace("_", " ")).encode("latin-1")
    await client.send(command if name == "bare_LF" else command + b"\r\n")
    if state == "content":
        before = len(upstream.contents)
        code = await client.say(".")
        return "." if code == "250" and command in upstream.contents[before] else code
    code = await client.code()
    if code in ("354", "334", "220"):
        return code
    return code if await client.say("NOOP") == "250" else f"{code}!"


@pytest.mark.anyio
@pytest.mark.parametrize("state", STATES)
async def test_state(state: str, tls_files: tuple[Path, Path]) -> None:
    """All commands in one state."""
    pipeline = {
        "tls": {"certificates": [{"chain": str(tls_files[0]), "key": str(tls_files[1])}]},
        "trust": {"xclient": ["127.0.0.2"]},
        "limits": {"auth_delay": "0s"},
        "stages": [{"users": {"users": {"tim": "tanstaaf"}}}, {"splice": {"handoff": "never"}}],
    }
    found = {}
    async with ObligingUpstream().listening() as upstream, between(upstream, pipeline) as gateway:
        for name, expected in ((name, code) for (name, column), code in EXPECTED.items() if column == state):
            if expected == "-":
                continue
            client = await Client.connected(gateway.port, "127.0.0.2" if state == "xclient" else "127.0.0.1")
            await reach(client, state)
            got = await result(client, name, upstream, state)
            if got != expected:
                found[name] = f"{got} instead of {expected}"
            client.leave()
    assert not found


def test_no_verb_is_forgotten() -> None:
    """The table has each verb that the frontend knows, and each state in `reach`."""
    assert {COMMANDS.get(row[0], row[0]).partition(" ")[0].partition("_")[0] for row in ROWS} >= set(VERBS)


# -- what needs a second client, or one that says nothing


@pytest.mark.anyio
async def test_a_session_too_many() -> None:
    """`limits.sessions`: the next one is told so instead of a greeting."""
    async with (
        ObligingUpstream().listening() as upstream,
        between(upstream, {"limits": {"sessions": 1}}) as gateway,
    ):
        first, second = await Client.connected(gateway.port), None
        assert await first.code() == "220"
        second = await Client.connected(gateway.port)
        assert (await second.reply()).startswith(b"421 4.7.0 ")
        assert await second.code() == "closed"
        assert await first.say("QUIT") == "221"
        first.leave()
        second.leave()


@pytest.mark.anyio
async def test_a_refusal_before_implicit_tls_has_no_byte(tls_files: tuple[Path, Path]) -> None:
    """There is nothing that the client could read it with."""
    pipeline = {
        "tls": {"certificates": [{"chain": str(tls_files[0]), "key": str(tls_files[1])}]},
        "listen": ["smtps://127.0.0.1:0"],
        "stages": [{"guard_says": {"at": "connect", "refuse": "ACCESS_DENIED"}}, {"splice": {"handoff": "never"}}],
    }
    async with ObligingUpstream().listening() as upstream, between(upstream, pipeline) as gateway:
        client = await Client.connected(gateway.port)
        assert await client.reply() == b""
        client.leave()


@pytest.mark.anyio
async def test_replies_to_a_group_are_one_write() -> None:
    """Each write is a packet, and each packet on a client's slow line is a wait (RFC 2920 section 3.2)."""
    async with ObligingUpstream().listening() as upstream, between(upstream, {}) as gateway:
        client = await Client.connected(gateway.port)
        assert await client.code() == "220"
        assert await client.say("EHLO c") == "250"
        group = [b"MAIL FROM:<a@example.org>", *(b"RCPT TO:<%d@example.org>" % n for n in range(50)), b"RSET", b""]
        await client.send(b"\r\n".join(group))
        got = await _read(client.reader)
        assert got.count(b"\r\n") == 52
        client.leave()


async def _read(reader: asyncio.StreamReader) -> bytes:
    """What one wait brings."""
    async with asyncio.timeout(10.0):
        return await reader.read(1 << 16)
