"""Dirt in credentials, by every path: the upstream sees well-formed commands only, and at most one login, the right one.

Whatever a client, an auth server or a pipeline says in names, passwords, tokens and ID values, it never becomes a
command of its own.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from gateway import Attempt, Authenticated, Kind, Password, Refuse, Session, Settings, Stage, Token
from gateway.testing.gateway import Gateway, running
from tests.dialogue.obliging import Client
from tests.dialogue.obliging_store import ObligingStore
from tests.dialogue.stages import STAGES
from tests.peers.recording_auth_server import Answer, RecordingAuthServer
from tests.peers.recording_auth_server import Client as AuthClient

DIRT: dict[str, bytes] = {
    "plain": b"tim",
    "blank": b"tim smith",
    "blanks around": b" tim ",
    "quote": b'ti"m',
    "quote and command": b'tim" "x"\x20a9 LOGOUT',
    "backslash": b"ti\\m",
    "backslash at the end": b"tim\\",
    "literal": b"tim {5}",
    "literal plus": b"{5+}",
    "brackets": b"(tim)[x]%*",
    "8-bit": "jürgen".encode(),
    "8-bit and quote": 'jür"gen\\'.encode(),
    "not UTF-8": b"j\xfcrgen",
    "CRLF": b"tim\r\na9 DELETE INBOX",
    "LF": b"tim\nDELE 1",
    "CR": b"tim\rDELE 1",
    "CRLF at the end": b"tim\r\n",
    "NUL": b"tim\0root",
    "tab": b"ti\tm",
    "DEL": b"ti\x7fm",
    "NIL": b"NIL",
    "dot": b".",
    "star": b"*",
    "long": b"x" * 1000,
    "longer than a literal may be": b"x" * 5000,
    "10 kB": b"x" * 10240,
    "10 kB 8-bit": "ü".encode() * 5120,
}
LINE_ENDS = ("CRLF", "LF", "CR", "CRLF at the end", "NUL")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """uvloop: the transcripts play on both loops."""
    return "asyncio", {"use_uvloop": True}


class Believes(Stage):
    """Believes everybody, and gives on what it got."""

    Settings = Settings
    kind = Kind.GUARD
    decides_identity = True
    never_pass = True
    required = False

    def mechanisms(self, session: Session) -> Sequence[str]:
        return ("PLAIN", "LOGIN", "XOAUTH2", "OAUTHBEARER")

    def auth(self, session: Session, attempt: Attempt) -> Refuse | Authenticated | None:
        match attempt.credentials:
            case Password(user=user, password=password):
                return Authenticated(user, password=password)
            case Token(user=user, token=token):
                return Authenticated(user, token=token)
        return None


class TellsSettings(Settings):
    """Whom to make of everybody."""

    user: str = "tim"
    password: str = "tanstaaf"


class Tells(Believes):
    """Makes somebody else of everybody, as an auth server may (Auth-User, Auth-Pass)."""

    Settings = TellsSettings
    settings: TellsSettings
    dirt: ClassVar[dict[str, str]] = {}

    def auth(self, session: Session, attempt: Attempt) -> Refuse | Authenticated | None:
        user, password = self.dirt.get("user", "tim"), self.dirt.get("password", "tanstaaf")
        return Authenticated("tim", identity=user, password=password)


def base(protocol: str, store: ObligingStore, assume: list[str], **more: object) -> Mapping[str, object]:
    """A pipeline to the store that believes everybody."""
    return {
        "listen": [f"{protocol}://127.0.0.1:0"],
        "allow_plaintext_auth": True,
        "limits": {"auth_delay": "0s", "auth_line": 16384},
        "upstreams": {"store": {"servers": [f"{protocol}://127.0.0.1:{store.port}"], "capabilities": {"assume": assume}}},
        "stages": ["believes", "splice"],
        **more,
    }


@asynccontextmanager
async def serving(pipeline: Mapping[str, object]) -> AsyncIterator[Gateway]:
    """The gateway."""
    async with running(pipeline, stages={**STAGES, "believes": Believes, "tells": Tells}) as gateway:
        yield gateway
        await gateway.idle()


def encoded(data: bytes) -> bytes:
    return base64.b64encode(data)


def quoted(data: bytes) -> bytes:
    return b'"%b"' % data.replace(b"\\", b"\\\\").replace(b'"', b'\\"')


def literal(data: bytes) -> bytes:
    return b"{%d+}\r\n%b" % (len(data), data)


Path = Callable[[bytes, bytes], bytes]
PATHS: dict[str, dict[str, Path]] = {
    "imap": {
        "quoted": lambda user, password: b"a LOGIN %b %b\r\n" % (quoted(user), quoted(password)),
        "literal": lambda user, password: b"a LOGIN %b %b\r\n" % (literal(user), literal(password)),
        "PLAIN": lambda user, password: b"a AUTHENTICATE PLAIN %b\r\n" % encoded(b"\0%b\0%b" % (user, password)),
        "LOGIN": lambda user, password: b"a AUTHENTICATE LOGIN\r\n%b\r\n%b\r\n" % (encoded(user), encoded(password)),
        "XOAUTH2": lambda user, password: b"a AUTHENTICATE XOAUTH2 %b\r\n"
        % encoded(b"user=%b\x01auth=Bearer %b\x01\x01" % (user, password)),
        "OAUTHBEARER": lambda user, password: b"a AUTHENTICATE OAUTHBEARER %b\r\n"
        % encoded(b"n,a=%b,\x01auth=Bearer %b\x01\x01" % (user, password)),
    },
    "pop3": {
        "USER": lambda user, password: b"USER %b\r\nPASS %b\r\n" % (user, password),
        "PLAIN": lambda user, password: b"AUTH PLAIN %b\r\n" % encoded(b"\0%b\0%b" % (user, password)),
        "LOGIN": lambda user, password: b"AUTH LOGIN\r\n%b\r\n%b\r\n" % (encoded(user), encoded(password)),
        "XOAUTH2": lambda user, password: b"AUTH XOAUTH2 %b\r\n"
        % encoded(b"user=%b\x01auth=Bearer %b\x01\x01" % (user, password)),
    },
}
UPSTREAMS = {
    "imap": {"unknown": [], "quoted": ["IDLE"], "plus": ["LITERAL+"], "plain": ["LOGINDISABLED", "AUTH=PLAIN", "SASL-IR"]},
    "pop3": {"user": ["USER"], "plain": ["SASL PLAIN"]},
}
CASES = [(protocol, path, upstream) for protocol in PATHS for path in PATHS[protocol] for upstream in UPSTREAMS[protocol]]


async def said(gateway: Gateway, *lines: bytes) -> bytes:
    """What the gateway says to these, up to its end or the answer of the upstream's login."""
    client = await Client.connected(gateway.port)
    await client.send(b"".join(lines))
    client.writer.write_eof()
    got = b""
    while line := await client.reply():
        got += line
    client.leave()
    return got


def judge(store: ObligingStore, name: str, user: bytes, password: bytes) -> None:
    """What the store saw: nothing but one login at most, with exactly these."""
    assert not store.wrong, (name, store.wrong)
    assert len(store.logins) <= 1, (name, store.logins)
    assert set(store.commands) <= {"LOGIN", "AUTHENTICATE", "ID", "LOGOUT", "USER", "PASS", "AUTH", "XCLIENT", "QUIT"}
    for login in store.logins:
        if len(login) == 1:
            assert password in login[0] and user.replace(b",", b"=2C") in login[0], (name, login)
        else:
            assert login[-2:] == (user, password), (name, login)
    for line in store.lines:
        assert b"DELE" not in line.split(), (name, line)


@pytest.mark.anyio
@pytest.mark.parametrize(("protocol", "path", "upstream"), CASES)
async def test_what_clients_say(protocol: str, path: str, upstream: str) -> None:
    """Each kind of dirt as user, and as password; clean ones get through as they are."""
    store = ObligingStore(protocol)
    through = 0
    async with store.listening(), serving(base(protocol, store, UPSTREAMS[protocol][upstream])) as gateway:
        for name, dirt in DIRT.items():
            for user, password in ((dirt, b"tanstaaf"), (b"tim", dirt)):
                store.clear()
                got = await said(gateway, PATHS[protocol][path](user, password))
                # POP3's USER and IMAP's quoted strings end where a line does: what was said is not what was meant.
                if name in LINE_ENDS and path in ("USER", "quoted"):
                    parts = b"".join(part for login in store.logins for part in login)
                    assert not store.wrong and not {0, 10, 13} & set(parts), (name, store.lines)
                    assert not any(b"DELE" in line.split() for line in store.lines), (name, store.lines)
                    continue
                if path == "USER" and user is dirt:
                    user = user.strip(b" ")
                judge(store, name, user, password)
                welcome = b"a OK done" if protocol == "imap" else b"+OK\r\n+OK\r\n" if path == "USER" else b"\n+OK\r\n"
                assert bool(store.logins) == (welcome in got), (name, got, store.logins)
                if name in LINE_ENDS:
                    assert not store.logins, name
                through += len(store.logins)
                if name == "plain":
                    assert store.logins, (path, got)
    assert through >= 15 or path in ("XOAUTH2", "OAUTHBEARER")


@pytest.mark.anyio
@pytest.mark.parametrize(("protocol", "upstream"), [(p, u) for p in UPSTREAMS for u in UPSTREAMS[p]])
@pytest.mark.parametrize("stage", ["", "master"])
async def test_what_stages_say(protocol: str, upstream: str, stage: str) -> None:
    """Auth-User and Auth-Pass of an auth stage, also where a master user logs in for them."""
    store = ObligingStore(protocol)
    master = [{"upstream_auth": {"master": {"user": "proxy", "password": "secret"}}}] if stage else []
    stages = {"stages": ["tells", *master, "splice"]}
    login = PATHS[protocol]["PLAIN"](b"tim", b"x")
    async with store.listening(), serving(base(protocol, store, UPSTREAMS[protocol][upstream], **stages)) as gateway:
        for name, dirt in DIRT.items():
            for what in ("user", "password"):
                store.clear()
                Tells.dirt = {what: dirt.decode("utf-8", "surrogateescape")}
                await said(gateway, login)
                assert not store.wrong, (name, store.wrong)
                assert len(store.logins) <= 1
                if name in LINE_ENDS and (what == "user" or not stage):
                    assert not store.logins, (name, store.lines)
                if store.logins and not stage:
                    expected = (dirt, b"tanstaaf") if what == "user" else (b"tim", dirt)
                    assert store.logins[0][-2:] == expected
                if name == "plain":
                    assert store.logins


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", ["imap", "pop3"])
async def test_what_an_auth_server_says(protocol: str) -> None:
    """Auth-User and Auth-Pass, as they came over the wire."""
    store = ObligingStore(protocol)
    dirty = [name for name in DIRT if name not in ("CRLF", "LF", "CRLF at the end", "CR")]  # those end a header field
    async with store.listening(), RecordingAuthServer() as server:
        pipeline = base(
            protocol, store, UPSTREAMS[protocol]["quoted" if protocol == "imap" else "user"],
            stages=[{"auth_http": f"http://127.0.0.1:{server.port}/auth"}, "splice"],
        )  # fmt: skip
        async with serving(pipeline) as gateway:
            for name in dirty:
                dirt = DIRT[name]
                head = b"HTTP/1.0 200 OK\r\nAuth-Status: OK\r\nAuth-Server: 127.0.0.1\r\nAuth-Port: %d\r\n" % store.port
                store.clear()
                server.default = AuthClient([Answer(head + b"Auth-User: %b\r\nAuth-Pass: tanstaaf\r\n\r\n" % dirt)])
                await said(gateway, PATHS[protocol]["PLAIN"](b"tim", b"x"))
                assert not store.wrong, (name, store.wrong)
                assert len(store.logins) <= 1
                if name == "NUL":
                    assert not store.logins
                if name in ("plain", "quote", "8-bit", "literal"):
                    assert store.logins == [(dirt, b"tanstaaf")], (name, store.lines)


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", ["imap", "pop3"])
@pytest.mark.parametrize("upstream", ["quoted", "plain"])
async def test_what_a_relay_says(protocol: str, upstream: str) -> None:
    """auth_relay passes messages, never commands."""
    store = ObligingStore(protocol)
    assume = UPSTREAMS[protocol].get(upstream) or ["USER", "SASL PLAIN"]
    if protocol == "imap" and upstream == "quoted":
        assume = ["AUTH=PLAIN", "SASL-IR"]
    async with (
        store.listening(),
        serving(base(protocol, store, assume, stages=["auth_relay", "splice"])) as gateway,
    ):
        for path in ("PLAIN", "literal" if protocol == "imap" else "USER"):
            for name, dirt in DIRT.items():
                for user, password in ((dirt, b"tanstaaf"), (b"tim", dirt)):
                    store.clear()
                    await said(gateway, PATHS[protocol][path](user, password))
                    wrong = [line for line in store.wrong if b"\0" not in line]  # PLAIN's own, inside the base64
                    assert not wrong, (path, name, wrong)
                    assert len(store.logins) <= 1
                    assert not any(b"DELE" in line.split() for line in store.lines), (name, store.lines)


@pytest.mark.anyio
async def test_what_id_says() -> None:
    """ID before login goes on, clean: no quotes that end, no control characters, no x- names, not too many pairs."""
    store = ObligingStore("imap")
    stages = ["believes", {"xclient": "send"}, "splice"]
    async with store.listening(), serving(base("imap", store, ["ID"], stages=stages)) as gateway:
        for name, dirt in DIRT.items():
            for key, value in ((b"name", dirt), (dirt[:30], b"x"), (b"x-originating-ip", dirt)):
                for form in (quoted, literal):
                    store.clear()
                    line = b"i ID (%b %b)\r\n" % (form(key), form(value))
                    if name in LINE_ENDS and form is quoted:
                        continue  # is several lines
                    got = await said(gateway, line, b"a LOGIN tim tanstaaf\r\n")
                    assert not store.wrong, (name, store.wrong)
                    if b"a OK done" in got:
                        assert store.commands == ["ID", "LOGIN"], (name, store.commands)
                        assert store.logins == [(b"tim", b"tanstaaf")]
                        shown = b"".join(store.lines)
                        assert shown.count(b"x-originating-ip") == 1
                        assert shown.count(b"127.0.0.1") >= 1
        pairs = b" ".join(b'"k%d" "v"' % number for number in range(30))
        store.clear()
        await said(gateway, b"i ID (%b)\r\na LOGIN tim tanstaaf\r\n" % pairs)
        assert store.commands == ["ID", "LOGIN"] and not store.wrong
        assert store.lines[0].count(b'"') <= 120


@pytest.mark.anyio
@pytest.mark.parametrize("protocol", ["imap", "pop3"])
async def test_pipelined_logins_are_one(protocol: str) -> None:
    """What stands behind the login is the upstream's to read, as it came, and no second login of ours."""
    store = ObligingStore(protocol)
    assume = UPSTREAMS[protocol]["quoted" if protocol == "imap" else "user"]
    for path, login in PATHS[protocol].items():
        async with store.listening(), serving(base(protocol, store, assume)) as gateway:
            store.clear()
            whole = login(b"tim", b"tanstaaf")
            await said(gateway, whole, whole)
            await asyncio.sleep(0)
        assert len(store.logins) == 1, path
        assert not store.wrong, path
        assert b"".join(store.after) == whole, path
