"""Every command in every state before login, IMAP and POP3: the tables are the specification, and no pair is missing.

Each pair is played in a session of its own. The words are those of the last line of the answer, its tag left out; a
`!` behind them: the session is over; `in`: the client is logged in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.frontend import imap, pop3
from gateway.testing.gateway import running
from tests.dialogue.obliging import Client
from tests.dialogue.obliging_store import ObligingStore
from tests.dialogue.stages import STAGES

IMAP = """
                  start               clear                 tls                 sasl                 literal
CAPABILITY        OK                  OK                    OK                  BAD                  BAD
NOOP              OK                  OK                    OK                  BAD                  BAD
NOOP_x            OK                  OK                    OK                  BAD                  BAD
LOGOUT            OK!                 OK!                   OK!                 BAD                  BAD
ID_NIL            OK                  OK                    OK                  BAD                  BAD
ID_bad            BAD                 BAD                   BAD                 BAD                  BAD
STARTTLS          OK:TLS              OK:TLS                BAD                 BAD                  BAD
STARTTLS_x        BAD                 BAD                   BAD                 BAD                  BAD
LOGIN_good        in                  NO:PRIVACYREQUIRED    in                  BAD                  BAD
LOGIN_wrong       NO:AUTHENTICATIONFAILED NO:PRIVACYREQUIRED NO:AUTHENTICATIONFAILED BAD            BAD
LOGIN_one         BAD                 BAD                   BAD                 BAD                  BAD
LOGIN_three       BAD                 BAD                   BAD                 BAD                  BAD
LOGIN_literal     +                   +                     +                   BAD                  BAD
AUTHENTICATE      BAD                 BAD                   BAD                 BAD                  BAD
AUTHENTICATE_asks +                   NO:PRIVACYREQUIRED    +                   BAD                  BAD
AUTHENTICATE_good in                  NO:PRIVACYREQUIRED    in                  BAD                  BAD
AUTHENTICATE_wrong NO:AUTHENTICATIONFAILED NO:PRIVACYREQUIRED NO:AUTHENTICATIONFAILED BAD           BAD
AUTHENTICATE_none NO                  NO:PRIVACYREQUIRED    NO                  BAD                  BAD
SELECT            BAD                 BAD                   BAD                 BAD                  BAD
(nothing)         BAD                 BAD                   BAD                 BAD                  BAD
no_tag            BAD                 BAD                   BAD                 BAD                  BAD
control           BAD                 BAD                   BAD                 BAD                  BAD
long              BYE!                BYE!                  BYE!                BAD                  BYE!
HTTP              BYE!                BYE!                  BYE!                BAD                  BAD
bare_LF           BYE!                BYE!                  BYE!                BYE!                 BYE!
message           BAD                 BAD                   BAD                 in                   BAD
cancel            BAD                 BAD                   BAD                 BAD                  BAD
"""

POP3 = """
            start         clear        tls           user          sasl
USER        +OK           -ERR[AUTH]   +OK           -ERR          -ERR
USER_empty  -ERR          -ERR         -ERR          -ERR          -ERR
PASS_good   -ERR          -ERR         -ERR          in            -ERR
PASS_wrong  -ERR          -ERR         -ERR          -ERR[AUTH]    -ERR
APOP_wrong  -ERR[AUTH]    -ERR[AUTH]   -ERR[AUTH]    -ERR          -ERR
APOP_bad    -ERR          -ERR[AUTH]   -ERR          -ERR          -ERR
AUTH        .             -ERR[AUTH]   .             -ERR          -ERR
AUTH_asks   +             -ERR[AUTH]   +             -ERR          -ERR
AUTH_good   in            -ERR[AUTH]   in            -ERR          -ERR
AUTH_wrong  -ERR[AUTH]    -ERR[AUTH]   -ERR[AUTH]    -ERR          -ERR
AUTH_none   -ERR          -ERR[AUTH]   -ERR          -ERR          -ERR
CAPA        .             .            .             .             -ERR
NOOP        +OK           +OK          +OK           +OK           -ERR
QUIT        +OK!          +OK!         +OK!          +OK!          -ERR
STLS        +OK:TLS       +OK:TLS      -ERR          -ERR          -ERR
STLS_x      -ERR          -ERR         -ERR          -ERR          -ERR
STAT        -ERR          -ERR         -ERR          -ERR          -ERR
(nothing)   -ERR          -ERR         -ERR          -ERR          -ERR
control     -ERR          -ERR         -ERR          -ERR          -ERR
long        -ERR          -ERR         -ERR          -ERR          -ERR
HTTP        -ERR!         -ERR!        -ERR!         -ERR!         -ERR
bare_LF     -ERR!         -ERR!        -ERR!         -ERR!         -ERR!
message     -ERR          -ERR         -ERR          -ERR          in
cancel      -ERR          -ERR         -ERR          -ERR          -ERR
"""

GOOD, WRONG = "AHRpbQB0YW5zdGFhZg==", "AHRpbQB3cm9uZw=="
IMAP_COMMANDS = {
    "NOOP_x": "a NOOP x",
    "ID_bad": "a ID (x)",
    "STARTTLS_x": "a STARTTLS x",
    "LOGIN_good": "a LOGIN tim tanstaaf",
    "LOGIN_wrong": "a LOGIN tim wrong",
    "LOGIN_one": "a LOGIN tim",
    "LOGIN_three": "a LOGIN tim tanstaaf more",
    "LOGIN_literal": "a LOGIN {3}",
    "AUTHENTICATE_asks": "a AUTHENTICATE LOGIN",
    "AUTHENTICATE_good": f"a AUTHENTICATE PLAIN {GOOD}",
    "AUTHENTICATE_wrong": f"a AUTHENTICATE PLAIN {WRONG}",
    "AUTHENTICATE_none": "a AUTHENTICATE GSSAPI",
    "SELECT": "a SELECT INBOX",
    "(nothing)": "",
    "no_tag": "NOOP",
    "control": "a NOOP \0",
    "long": "a NOOP " + "x" * 3000,
    "HTTP": "GET / HTTP/1.1",
    "bare_LF": "a NOOP\n",
    "message": GOOD,
    "cancel": "*",
}
POP3_COMMANDS = {
    "USER": "USER tim",
    "USER_empty": "USER",
    "PASS_good": "PASS tanstaaf",
    "PASS_wrong": "PASS wrong",
    "APOP_wrong": "APOP tim c4c9334bac560ecc979e58001b3e22fb",
    "APOP_bad": "APOP tim",
    "AUTH_asks": "AUTH LOGIN",
    "AUTH_good": f"AUTH PLAIN {GOOD}",
    "AUTH_wrong": f"AUTH PLAIN {WRONG}",
    "AUTH_none": "AUTH GSSAPI",
    "STLS_x": "STLS x",
    "(nothing)": "",
    "control": "NOOP \0",
    "long": "NOOP " + "x" * 3000,
    "HTTP": "GET / HTTP/1.1",
    "bare_LF": "NOOP\n",
    "message": GOOD,
    "cancel": "*",
}
BEFORE = {
    ("imap", "tls"): "a0 STARTTLS",
    ("imap", "sasl"): "a0 AUTHENTICATE PLAIN",
    ("imap", "literal"): "a0 LOGIN {3}",
    ("pop3", "tls"): "STLS",
    ("pop3", "user"): "USER tim",
    ("pop3", "sasl"): "AUTH PLAIN",
}


def cells(table: str) -> dict[str, dict[str, str]]:
    """By state, then command."""
    states, *rows = (line.split() for line in table.strip().splitlines())
    assert all(len(row) == len(states) + 1 for row in rows), [row[0] for row in rows if len(row) != len(states) + 1]
    return {state: {row[0]: row[number] for row in rows} for number, state in enumerate(states, 1)}


CELLS = {"imap": cells(IMAP), "pop3": cells(POP3)}
CASES = [(protocol, state) for protocol, states in CELLS.items() for state in states]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """uvloop: the transcripts play on both loops."""
    return "asyncio", {"use_uvloop": True}


def pipeline(protocol: str, store: ObligingStore, tls_files: tuple[Path, Path], **more: object) -> Mapping[str, object]:
    """A pipeline to the store, with short clocks."""
    return {
        "listen": [f"{protocol}://127.0.0.1:0"],
        "tls": {"certificates": [{"chain": str(tls_files[0]), "key": str(tls_files[1])}]},
        "limits": {"auth_delay": "0s", "auth_line": 2000},
        "upstreams": {"store": {"servers": [f"{protocol}://127.0.0.1:{store.port}"], "capabilities": {"assume": ["USER"]}}},
        "stages": [{"users": {"users": {"tim": "tanstaaf"}, "mechanisms": ["PLAIN", "LOGIN", "APOP"]}}, "splice"],
        **more,
    }


def command_of(protocol: str, name: str) -> bytes:
    """The octets of a command of the table."""
    if protocol == "imap":
        text = IMAP_COMMANDS.get(name, f"a {name.replace('_', ' ')}")
    else:
        text = POP3_COMMANDS.get(name, name)
    return text.encode("latin-1") + (b"" if text.endswith("\n") else b"\r\n")


async def answer(client: Client, protocol: str, command: bytes) -> str:
    """The last line of the answer, in the table's words; the session's end is not in them."""
    while line := await client.reply():
        words = line.decode().split()
        if protocol == "pop3":
            if line.startswith((b"+OK capability", b"+OK methods")):
                while (line := await client.reply()) and line != b".\r\n":
                    pass
                return "."
            code = words[1] if words[1:] and words[1][0] == "[" else ""
            return f"{words[0]}{code}"
        if words[0] == "+":
            return "+"
        if words[:2] == ["*", "BYE"]:
            if b"logging out" not in line:
                return "BYE"
        elif words[0] != "*" or words[1] == "BAD":
            code = words[2].strip("[]") if words[2][0] == "[" else ""
            return f"{words[1]}:{code}" if code else words[1]
    return ""


async def result(client: Client, protocol: str, name: str, store: ObligingStore) -> str:
    """What the command brings, in the table's words."""
    command = command_of(protocol, name)
    await client.send(command)
    word = await answer(client, protocol, command)
    if store.logins:
        return "in"
    if name in ("STARTTLS", "STLS") and word[-2:] == "OK":
        await client.start_tls()
        word += ":TLS"
    if word == "+":
        return word
    await client.send(b"n NOOP\r\n" if protocol == "imap" else b"NOOP\r\n")
    line = await client.reply()
    return word if line[:4] == (b"n OK" if protocol == "imap" else b"+OK\r") else f"{word}!"


@pytest.mark.anyio
@pytest.mark.parametrize(("protocol", "state"), CASES)
async def test_state(protocol: str, state: str, tls_files: tuple[Path, Path]) -> None:
    """All commands in one state."""
    found = {}
    store = ObligingStore(protocol)
    async with (
        store.listening(),
        running(
            pipeline(protocol, store, tls_files, allow_plaintext_auth=state not in ("clear", "tls")), stages=STAGES
        ) as gateway,
    ):
        for name, expected in CELLS[protocol][state].items():
            store.clear()
            client = await Client.connected(gateway.port)
            await client.reply()
            before = BEFORE.get((protocol, state))
            if before is not None:
                await client.send(before.encode() + b"\r\n")
                await client.reply()
            if state == "tls":
                await client.start_tls()
            if state == "literal":
                await client.send(b"tim")
            got = await result(client, protocol, name, store)
            if got != expected:
                found[name] = f"{got} instead of {expected}"
            assert not store.wrong
            client.leave()
            await gateway.idle()
    assert not found


def test_no_command_is_forgotten() -> None:
    """The tables have each command that a frontend knows."""
    for protocol, known in (("imap", imap.COMMANDS), ("pop3", {**pop3.COMMANDS, **pop3.AFTER_USER})):
        rows = {name.partition("_")[0] for name in next(iter(CELLS[protocol].values()))}
        assert rows >= set(known), protocol


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", ["imap", "pop3"])
async def test_a_session_too_many(protocol: str, tls_files: tuple[Path, Path]) -> None:
    """`limits.sessions`: the next one is told so instead of a greeting."""
    store = ObligingStore(protocol)
    limited = {"limits": {"sessions": 1}, "allow_plaintext_auth": True}
    async with store.listening(), running(pipeline(protocol, store, tls_files, **limited), stages=STAGES) as gateway:
        first = await Client.connected(gateway.port)
        await first.reply()
        second = await Client.connected(gateway.port)
        line = await second.reply()
        assert line.startswith(b"* BYE [UNAVAILABLE] " if protocol == "imap" else b"-ERR [SYS/TEMP] ")
        assert await second.reply() == b""
        first.leave()
        second.leave()


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", ["imap", "pop3"])
async def test_a_refusal_before_implicit_tls_has_no_byte(protocol: str, tls_files: tuple[Path, Path]) -> None:
    """There is nothing that the client could read it with."""
    store = ObligingStore(protocol)
    more = {
        "listen": [f"{protocol}s://127.0.0.1:0"],
        "stages": [
            {"guard_says": {"at": "connect", "refuse": "ACCESS_DENIED"}}, {"users": {"users": {"tim": "x"}}}, "splice",
        ],
    }  # fmt: skip
    async with store.listening(), running(pipeline(protocol, store, tls_files, **more), stages=STAGES) as gateway:
        client = await Client.connected(gateway.port)
        assert await client.reply() == b""
        client.leave()


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", ["imap", "pop3"])
async def test_nothing_said_before_tls_counts(protocol: str, tls_files: tuple[Path, Path]) -> None:
    """USER in clear is forgotten; so is a literal that waits: STARTTLS cannot come amid either."""
    store = ObligingStore(protocol)
    async with (
        store.listening(),
        running(pipeline(protocol, store, tls_files, allow_plaintext_auth=True), stages=STAGES) as gateway,
    ):
        client = await Client.connected(gateway.port)
        await client.reply()
        await client.send(b"a LOGIN {10}\r\n" if protocol == "imap" else b"USER tim\r\n")
        await client.reply()
        await client.send(b"b STARTTLS\r\n" if protocol == "imap" else b"STLS\r\n")
        line = b""
        if protocol == "pop3":
            line = await client.reply()
            assert line.startswith(b"-ERR")
            await client.send(b"STLS\r\n")
            assert (await client.reply()).startswith(b"+OK")
            await client.start_tls()
            await client.send(b"PASS tanstaaf\r\n")
            assert (await client.reply()).startswith(b"-ERR")
        assert not store.logins
        client.leave()
        await asyncio.sleep(0)
