"""Nothing that a run writes holds a secret: log, transcripts, standard error (promise 6).

A gateway runs with marked secrets in every place where one can be, through good and bad logins, broken auth servers
and upstreams that repeat what they were sent. Then everything it wrote is searched for the marks, as they are and in
every coding they travel in.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from tests.fault.client import Client
from tests.fault.gateway_run import GATEWAY, Running, started

pytestmark = pytest.mark.anyio

KEY = "Mark-key/1%&<x>"
FIXED = "Mark-fixed?2=§&"
ENVIRONMENT = {"AUTH_KEY": KEY, "UPSTREAM_PASSWORD": FIXED}
OVERRIDE = "Mark-override/3+ß"
"""What the auth server says in Auth-User: a known deployment has the password there."""
INNER = "Mark-inner/4+ß"
"""What it says in Auth-Pass."""

RIGHT, WRONG = 'Mark-right:5\\"%ä', "Mark-wrong:6'%\N{EURO SIGN}"
TOKEN, BAD_TOKEN = "Mark-token.7-_~+/==", "Mark-token.8-_~+/=="
RAW = "Mark-raw-9"
LONG = "Mark-long-" + "x" * 3000
SECRETS = [KEY, FIXED, OVERRIDE, INNER, RIGHT, WRONG, TOKEN, BAD_TOKEN, RAW, LONG]


def b64(text: str | bytes) -> str:
    """Base64, as SASL has it."""
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def codings(secret: str) -> Iterator[str]:
    """The ways in which a secret may stand in a text: whole, or what is sure to be there of it."""
    raw = secret.encode()
    yield secret
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield repr(secret)[1:-1]
    yield repr(raw)[2:-1]
    for safe in ("", "/", "-._~"):
        yield quote(secret, safe=safe)
        yield quote(secret, safe=safe).lower()
    yield quote_plus(secret)
    yield "".join(f"%{octet:02x}" for octet in raw)
    yield raw.hex()
    for before in range(3):  # base64 of it behind so many octets: without the ends, which depend on what is beside it
        coded = base64.b64encode(b"\0" * before + raw).decode()
        yield coded[4 if before else 0 : len(coded) // 4 * 4 - 4]
    xtext = "".join(chr(octet) if 33 <= octet <= 126 and octet not in b"+=" else f"+{octet:02X}" for octet in raw)
    yield xtext


def test_the_search_finds_what_is_there() -> None:
    for before in ("", "\0tim\0", "\0alice\0", "user=tim\1auth=Bearer "):
        for text in (before + RIGHT, b64(before + RIGHT + "!"), quote(before + RIGHT)):
            assert any(coding in text for coding in codings(RIGHT)), text


# -- the servers ------------------------------------------------------------------------------------------------


class Servers:
    """An auth server and an upstream, whose `auth` and `mail` say how they behave just now."""

    def __init__(self) -> None:
        self.auth = self.mail = "good"
        self.asked: list[bytes] = []
        self.heard: list[bytes] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One question by HTTP."""
        try:
            question = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        self.asked.append(question)
        line = next(line for line in question.split(b"\r\n") if line.startswith(b"Auth-Pass: "))
        go = f"Auth-Server: 127.0.0.1\r\nAuth-Port: {self.port}\r\n"
        ok = "HTTP/1.1 200 OK\r\nAuth-Status: OK\r\n"
        answers = {
            "good": f"{ok}{go}\r\n",
            "override": f"{ok}Auth-User: {OVERRIDE}\r\nAuth-Pass: {INNER}\r\n{go}\r\n",
            "long": f"{ok}Auth-User: {LONG}\r\nAuth-Pass: {LONG}\r\n{go}\r\n",
            "refuse": "HTTP/1.1 200 OK\r\nAuth-Status: Invalid login\r\n\r\n",
            "later": "HTTP/1.1 200 OK\r\nAuth-Status: later\r\nAuth-Error-Code: 451 4.3.0\r\n\r\n",
            "no upstream": f"{ok}Auth-User: {OVERRIDE}\r\nAuth-Server: [nowhere\r\nAuth-Port: x\r\n\r\n",
            "page": "HTTP/1.1 500 Oops\r\n\r\n",
            "close": "",
        }
        if self.auth == "echo":
            writer.write(line + b"\r\n" + question)  # as a server that got lost
        elif self.auth == "echo in a field":
            writer.write(b"HTTP/1.1 200 OK\r\n" + line.replace(b": ", b" ") + b"\r\n\r\n")
        else:
            writer.write(answers[self.auth].encode())
        writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One SMTP connection."""
        writer.write(b"220 upstream.test\r\n")
        while line := (await reader.readline()).rstrip():
            self.heard.append(line)
            verb, _, rest = line.partition(b" ")
            verb = verb.upper()
            if verb in (b"AUTH", b"XCLIENT") and self.mail == "close":
                break
            if verb in (b"AUTH", b"XCLIENT") and self.mail == "echo":  # as Sendmail does
                writer.write(b'500 5.5.1 Command unrecognized: "' + line + b'"\r\n')
            elif verb in (b"AUTH", b"XCLIENT") and self.mail == "garbage":
                writer.write(line + b"\r\n")
            elif verb == b"AUTH" and self.mail == "refuse":
                writer.write(b"535 5.7.8 no\r\n")
            elif verb == b"AUTH" and rest == b"LOGIN":
                writer.write(b"334 VXNlcm5hbWU6\r\n")
                name = await reader.readline()
                writer.write(b"334 " + b64(INNER).encode() + b"\r\n")  # and repeats what it was told before
                word = await reader.readline()
                writer.write(b'500 5.5.1 "' + name.strip() + b'" "' + word.strip() + b'"\r\n')
            else:
                writer.write(self._reply(verb))
        writer.close()

    def _reply(self, verb: bytes) -> bytes:
        if verb == b"EHLO":
            login = b"LOGIN" if self.mail == "login" else b"PLAIN"
            return b"250-upstream.test\r\n250-XCLIENT NAME ADDR LOGIN\r\n250 AUTH " + login + b"\r\n"
        return {b"AUTH": b"235 ok\r\n", b"XCLIENT": b"220 ok\r\n", b"DATA": b"354 go\r\n", b"QUIT": b"221 bye\r\n"}.get(
            verb, b"250 ok\r\n"
        )

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Servers]:
        """Both, on ports of their own."""
        mail = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        auth = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        self.port, self.url = mail.sockets[0].getsockname()[1], f"http://127.0.0.1:{auth.sockets[0].getsockname()[1]}/"
        try:
            yield self
        finally:
            mail.close()
            auth.close()

    def pipelines(self, log: Path) -> list[dict[str, object]]:
        """XCLIENT LOGIN; the client's login at the upstream; a fixed login there."""
        auth = {"url": self.url, "headers": {"X-Auth-Key": "${AUTH_KEY}"}, "request_timeout": "2s"}
        tokens = ["plain", "login", "cram-md5", "xoauth2", "oauthbearer"]
        fixed = {"user": "gateway", "password": "${UPSTREAM_PASSWORD}"}
        common: dict[str, object] = {
            "allow_plaintext_auth": True,
            "limits": {"auth_delay": "1ms", "linger": "100ms", "auth_failures": 100, "errors": 100},
            "upstreams": {"mta": {"servers": [f"smtp://127.0.0.1:{self.port}"], "command_timeout": "2s"}},
        }
        splice: dict[str, object] = {"splice": {"handoff": "never"}}
        stages: list[list[object]] = [
            [{"auth_http": {**auth, "methods": tokens}}, "xclient", splice],
            [{"auth_http": auth}, {"upstream_auth": "client"}, splice],
            [{"upstream_auth": fixed}, splice],
        ]
        pipelines = [{"name": f"p{number}", "stages": one, **common} for number, one in enumerate(stages)]
        for pipeline in pipelines:
            pipeline["log"] = {"debug_clients": ["127.0.0.0/8"]}
        return [
            *pipelines[:2],
            {**pipelines[2], "process": {"log": {"file": str(log), "format": "json", "level": "debug"}}},
        ]


# -- the sessions -----------------------------------------------------------------------------------------------

Login = Callable[[Client, str, str], Awaitable[str]]


async def plain(client: Client, password: str, token: str) -> str:
    return await client.say("AUTH PLAIN " + b64(f"\0tim\0{password}"))


async def plain_in_two(client: Client, password: str, token: str) -> str:
    await client.say("AUTH PLAIN")
    return await client.say(b64(f"\0tim\0{password}"))


async def login(client: Client, password: str, token: str) -> str:
    await client.say("AUTH LOGIN")
    await client.say(b64("tim"))
    return await client.say(b64(password))


async def cram_md5(client: Client, password: str, token: str) -> str:
    reply = await client.say("AUTH CRAM-MD5")
    if not reply.startswith("334"):
        return reply
    challenge = base64.b64decode(reply[4:])
    digest = hmac.new(password.encode(), challenge, hashlib.md5).hexdigest()
    DIGESTS.append(digest)
    return await client.say(b64(f"tim {digest}"))


async def xoauth2(client: Client, password: str, token: str) -> str:
    reply = await client.say("AUTH XOAUTH2 " + b64(f"user=tim\1auth=Bearer {token}\1\1"))
    return await client.say(b64(token)) if reply.startswith("334") else reply


async def oauthbearer(client: Client, password: str, token: str) -> str:
    reply = await client.say("AUTH OAUTHBEARER " + b64(f"n,a=tim,\1auth=Bearer {token}\1\1"))
    return await client.say("AQ==") if reply.startswith("334") else reply


DIGESTS: list[str] = []
PASSWORDS: list[Login] = [plain, plain_in_two, login]
LOGINS: list[Login] = [*PASSWORDS, cram_md5, xoauth2, oauthbearer]


async def send(client: Client) -> None:
    """A message, as far as it goes."""
    for line in ("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA"):
        if (await client.say(line))[:1] not in "23":
            return
    await client.say(f"Subject: x\r\n\r\nMy password is {RAW}.\r\n.")


async def odd_sessions(gateway: Running) -> None:
    """Secrets where they do not belong."""
    secret, response = b64(f"\0tim\0{WRONG}"), b64(WRONG)
    for lines in (
        [f"AUTH PLAIN {RAW}"],  # no base64
        [f"AUTH PLAIN {RAW} {secret}"],
        [f"AUTH {RAW}"],
        ["AUTH LOGIN", RAW],
        ["AUTH LOGIN", b64("tim"), RAW],
        ["AUTH LOGIN", b64("tim"), b64(LONG * 10)],
        ["AUTH LOGIN", "*", response],  # cancelled, and said all the same
        ["AUTH GSSAPI", response],  # not offered, and said all the same
        [response],
        [f"{RAW}: {RAW}", "NOOP"],
        [f"PASS {RAW}"],
        [f"AUTH=PLAIN {secret}"],
        ["AUTH PLAIN " + b64("\0tim\0" + LONG * 10)],
        ["AUTH PLAIN " + b64(b"\0tim\0" + RAW.encode() + b"\xff\xfe")],
        ["AUTH PLAIN " + b64(f"\0tim\0{RAW}\0{RAW}")],
        ["AUTH PLAIN " + b64(f"other\0tim\0{RAW}")],
        ["AUTH XOAUTH2 " + b64(f"user=tim\1auth=Basic {RAW}\1\1")],
        ["AUTH OAUTHBEARER " + b64(f"n,a=tim,\1host=x\1auth={RAW}")],
        ["AUTH CRAM-MD5", b64(f"tim {RAW}")],
        ["MAIL FROM:<a@example.org> AUTH=" + RAW],
        ["XCLIENT LOGIN=" + RAW],
    ):
        client = await gateway.client()
        for line in lines:
            if not await client.say(line):
                break
        client.leave("close")
    client = Client(*await asyncio.open_connection("127.0.0.1", gateway.port))
    client.send(b"AUTH PLAIN " + secret.encode() + b"\r\n")  # before EHLO, and before the greeting
    client.send(b"EHLO client.test\r\nAUTH LOGIN\r\n" + response.encode() + b"\r\n")  # with all at once
    client.send(b"AUTH PLAIN " + secret.encode() + b"\n")  # and a bare LF
    await client.rest()
    client = await gateway.client()
    client.send(b"AUTH PLAIN " + secret.encode())
    client.leave("reset")


async def all_sessions(gateway: Running, servers: Servers) -> None:
    """Each login, each fault of the auth server, each fault of the upstream."""
    for servers.auth in (
        "good",
        "override",
        "refuse",
        "later",
        "no upstream",
        "page",
        "close",
        "echo",
        "echo in a field",
    ):
        for try_login in LOGINS:
            right = servers.auth in ("good", "override")
            client = await gateway.client(0)
            await try_login(client, RIGHT if right else WRONG, TOKEN if right else BAD_TOKEN)
            await try_login(client, RIGHT if right else WRONG, TOKEN if right else BAD_TOKEN)  # 503 where it went well
            await send(client)
            client.leave("close")
    for pipeline in range(3):
        for servers.auth in ("good", "override", "long"):
            for servers.mail in ("good", "refuse", "echo", "garbage", "close", "login"):
                for try_login in PASSWORDS if pipeline < 2 else []:
                    client = await gateway.client(pipeline)
                    await try_login(client, RIGHT, TOKEN)
                    await send(client)
                    client.leave("close")
                if pipeline == 2:
                    client = await gateway.client(pipeline)
                    await send(client)
                    client.leave("close")
    servers.auth, servers.mail = "good", "good"
    await odd_sessions(gateway)


def output_of(command: str, folder: Path) -> str:
    """What another command prints of the same file."""
    environment = {**os.environ, **ENVIRONMENT}
    ended = subprocess.run(
        [*GATEWAY, command, "pipeline.yaml"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return ended.stdout + ended.stderr


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["here"])
async def test_nothing_that_a_run_writes_holds_a_secret(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    async with asyncio.timeout(60), Servers().listening() as servers:
        async with started(tmp_path, servers.pipelines(log), environment=ENVIRONMENT) as gateway:
            await all_sessions(gateway, servers)
            gateway.process.send_signal(signal.SIGTERM)
            assert await gateway.ended() == 0
        printed = [await asyncio.to_thread(output_of, command, tmp_path) for command in ("check", "probe")]
    written = log.read_text() + "\n".join([*gateway.log, *printed])

    # the secrets were in play, and the transcripts were written
    asked, heard = b"".join(servers.asked), b"\n".join(servers.heard)
    assert f"X-Auth-Key: {KEY}\r\n".encode() in asked
    assert b64(f"\0gateway\0{FIXED}").encode() in heard
    assert b64(f"\0{OVERRIDE}\0{INNER}").encode() in heard
    assert b" LOGIN=Mark-override/3" in heard
    assert len(re.findall(r'"record":"transcript".*"line":"C: AUTH ', written)) > 50
    assert len(re.findall(r'"record":"transcript".*"line":"U> AUTH ', written)) > 10
    assert '"record":"auth_failure"' in written and '"record":"internal_error"' not in written

    marks = {coding for secret in [*SECRETS, *DIGESTS] for coding in codings(secret)}
    assert min(map(len, marks)) >= 8
    found = [mark for mark in marks if mark in written]
    assert not found, [line for line in written.splitlines() if any(mark in line for mark in found)][:20]
