"""A whole service under load while what it needs is killed, hangs (SIGSTOP), and comes back: upstream, auth server, Redis.

Clients send one numbered message after the other. Nothing is acknowledged that the upstream did not take, nothing is
there twice, nobody hears 535 for an outage or waits longer than the configured time, and afterwards all is as before.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from typing import Literal

import pytest

from tests.fault.client import Client
from tests.fault.service import LIMIT, Service, service
from tests.peers.process import Process, free_port, port_open, scratch
from tests.peers.redis import RedisServer
from tests.peers.require import require
from tests.peers.smtp_sink import SmtpSink

UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["here"])
pytestmark = [pytest.mark.peers, pytest.mark.anyio, UVLOOP]

CLIENTS = 12
SOME = 36  # outcomes that tell how things are
CLOCK = 0.5  # seconds: every time-out that is configured here
SOAK = os.environ.get("GATEWAY_SOAK") == "1"
SLACK = 4.0 if SOAK else 30.0  # for several clocks in a row (connect, greeting, reply), and for a busy machine
WHOLE = {"splice": {"handoff": "never"}}  # every reply passes through the gateway

Way = Literal["killed", "hung"]
ways = pytest.mark.parametrize("way", ["killed", "hung"])


class Load:
    """Clients that send until the end. `outcomes`: 250 for an acknowledged message, else the reply that ended it."""

    def __init__(self, running: Service, password: Callable[[int], str] | None = None) -> None:
        self.running = running
        self.outcomes: list[tuple[int, str]] = []
        self.longest = 0.0  # seconds for one reply
        self._password = password
        self._numbers = count(1)
        self._over = False
        self._news = asyncio.Event()

    async def more(self, code: str, number: int = SOME, of: Callable[[int], bool] = lambda _: True) -> None:
        """Wait for so many further outcomes that begin with `code`, of clients that are meant."""
        seen, found = len(self.outcomes), 0
        async with asyncio.timeout(LIMIT):
            while found < number:
                await self._news.wait()
                self._news.clear()
                found += sum(said.startswith(code) and of(who) for who, said in self.outcomes[seen:])
                seen = len(self.outcomes)

    def said(self, of: Callable[[int], bool] = lambda _: True) -> Counter[str]:
        """How often each code was an outcome."""
        return Counter(said[:3] for number, said in self.outcomes if of(number))

    def acknowledged(self) -> set[int]:
        """Numbers of the messages that were."""
        return {number for number, said in self.outcomes if said.startswith("250")}

    async def client(self) -> None:
        """Send one after the other."""
        while not self._over:
            number = next(self._numbers)
            try:
                said = await self._send(number)
            except ConnectionError as error:
                said = f"lost: {error}"
            self.outcomes.append((number, said))
            self._news.set()

    def stop(self) -> None:
        self._over = True

    async def _send(self, number: int) -> str:
        begun = time.monotonic()
        client = Client(*await asyncio.open_connection("127.0.0.1", self.running.port))
        lines = ["", "EHLO client.test", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA"]
        if self._password is not None:
            credentials = base64.b64encode(f"\0joe\0{self._password(number)}".encode()).decode()
            lines.insert(2, f"AUTH PLAIN {credentials}")
        try:
            for line in (*lines, f"Subject: {number}\r\n\r\ntext\r\n."):
                reply = await (client.say(line) if line else client.reply())
                self.longest = max(self.longest, time.monotonic() - begun)
                begun = time.monotonic()
                if reply[:1] not in ("2", "3"):
                    return reply or "lost: closed"
            client.send(b"QUIT\r\n")
            return reply
        finally:
            client.writer.close()


@asynccontextmanager
async def loaded(running: Service, password: Callable[[int], str] | None = None) -> AsyncIterator[Load]:
    """The load; at the end of the body all clients finish what they do."""
    load = Load(running, password)
    async with asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(load.client())
        try:
            yield load
        finally:
            load.stop()
    assert load.longest < CLOCK + SLACK, load.longest


@asynccontextmanager
async def without(peer: Process, way: Way) -> AsyncIterator[None]:
    """The peer is killed and started again, or stopped and continued."""
    if way == "hung":
        os.kill(peer.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(peer.pid, signal.SIGCONT)
    else:
        if isinstance(peer, RedisServer):
            peer.kill()
        else:
            peer.stop(signal.SIGKILL)
        try:
            yield
        finally:
            await asyncio.to_thread(peer.start)


@pytest.fixture
def sink() -> Iterator[SmtpSink]:
    with scratch() as folder, SmtpSink(folder) as running:
        yield running


def pools(sink: SmtpSink) -> Mapping[str, object]:
    """The sink with short clocks."""
    clocks = ("connect_timeout", "greeting_timeout", "command_timeout", "data_done_timeout", "queue_timeout")
    health = {"interval": CLOCK, "timeout": CLOCK, "fall": 2, "rise": 1, "slow_start": 0}
    return {"sink": {"servers": [f"smtp://127.0.0.1:{sink.port}"], "health": health, **dict.fromkeys(clocks, CLOCK)}}


def check_messages(sink: SmtpSink, load: Load) -> None:
    """What was acknowledged is there, and nothing is there twice."""
    found = Counter(int(number) for mail in sink.messages() for number in re.findall(rb"^Subject: (\d+)", mail, re.M))
    assert len(load.acknowledged()) > SOME and load.acknowledged() <= found.keys()
    assert not [number for number, times in found.items() if times > 1]


@contextmanager
def recovery(what: str, configured: float) -> Iterator[None]:
    """Measures it."""
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    print(f"{what}: serves again after {took:.2f} s")
    assert took < configured + SLACK


# -- the upstream


@ways
async def test_the_upstream(tmp_path: Path, sink: SmtpSink, way: Way) -> None:
    async with service(tmp_path, {"stages": [WHOLE], "upstreams": pools(sink)}, workers=2) as running:
        async with loaded(running) as load:
            await load.more("250")
            async with without(sink, way):
                await load.more("451")
                await running.record("upstream_down")
                await load.more("451")
            with recovery(f"upstream {way}", CLOCK):
                await load.more("250", 1)
            await load.more("250")
        assert set(load.said()) == {"250", "451"}, load.said()
        assert running.all("upstream_up") and not running.all("worker_died") and not running.all("internal_error")
        check_messages(sink, load)


# -- the auth server


class NginxAuth(Process):
    """nginx as an auth server: the password is `secret`, and the pipeline chooses the upstream."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._program = require("nginx")
        self.port = free_port()
        self._file = folder / "nginx.conf"
        paths = "".join(
            f"{name}_temp_path {folder}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        self._file.write_text(
            f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{ }}\n"
            f"http {{ access_log off; {paths}\n server {{ listen 127.0.0.1:{self.port}; location = /auth {{\n"
            '  if ($http_auth_pass != secret) { add_header Auth-Status "Invalid login"; return 204; }\n'
            "  add_header Auth-Status OK; return 204;\n } } }\n"
        )

    def start(self) -> NginxAuth:
        """Start it; after this it accepts connections."""
        command = [self._program, "-e", str(self.folder / "error.log"), "-c", str(self._file)]
        self.launch(command, port_open(self.port))
        return self


@ways
async def test_the_auth_server(tmp_path: Path, sink: SmtpSink, way: Way) -> None:
    """Every third client has a wrong password: it hears 535, but never while nobody can tell."""
    with scratch() as folder, NginxAuth(folder) as server:
        asked = {"url": f"http://127.0.0.1:{server.port}/auth", "request_timeout": CLOCK}
        pipeline = {
            "stages": [{"auth_http": asked}, WHOLE],
            "upstreams": pools(sink),
            "allow_plaintext_auth": True,
            "limits": {"auth_delay": "10ms"},
        }
        async with service(tmp_path, pipeline, workers=2) as running:
            async with loaded(running, lambda number: "secret" if right(number) else "guess") as load:
                for code, who in (("250", right), ("535", wrong)):
                    await load.more(code, of=who)
                async with without(server, way):
                    for who in (right, wrong):
                        await load.more("454", CLIENTS, of=who)
                    before = len(load.outcomes)
                    await load.more("454")
                    assert {said[:3] for _, said in load.outcomes[before:]} == {"454"}
                with recovery(f"auth server {way}", CLOCK):
                    await load.more("250", 1)
                for code, who in (("250", right), ("535", wrong)):
                    await load.more(code, of=who)
            assert set(load.said(right)) == {"250", "454"}, load.said(right)
            assert set(load.said(wrong)) == {"535", "454"}, load.said(wrong)
            check_messages(sink, load)


def right(number: int) -> bool:
    """Whether this message comes with the password."""
    return number % 3 > 0


def wrong(number: int) -> bool:
    """Or with another."""
    return not right(number)


# -- the store


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with scratch() as folder, RedisServer(folder) as running:
        yield running


ANSWERS: dict[str, tuple[dict[str, object], str]] = {
    "tempfail": ({}, "421"),
    "reject": ({"on_error": "reject"}, "554"),
    "impatient": ({"timeout": CLOCK / 2}, "421"),  # the stages give up before the store does
    "observe": ({"mode": "observe"}, "250"),  # what only looks harms nobody
}


@ways
@pytest.mark.parametrize("case", ANSWERS)
async def test_the_store(tmp_path: Path, sink: SmtpSink, redis: RedisServer, way: Way, case: str) -> None:
    """`on_error` of each stage decides. The log says it once a worker and not once a session."""
    how, answer = ANSWERS[case]
    each = {"timeout": 2 * CLOCK, **how}
    pipeline = {
        "stages": [
            {"ban": {"limit": "20/10m", **each}},
            {"connection_limit": {"per_client": 1000, **each}},
            {"rate_limit": {"count": "messages", "limit": "1000000/1h", **each}},
            WHOLE,
        ],
        "upstreams": pools(sink),
    }
    store = {"redis": {"url": f"unix://{redis.path}", "timeout": CLOCK}}
    async with service(tmp_path, pipeline, workers=2, store=store) as running:
        async with loaded(running) as load:
            await load.more("250")
            async with without(redis, way):
                await running.record("store_down")
                await load.more(answer, 5 * SOME)
            with recovery(f"redis {way}, {case}", 1.0):  # a server that is away is tried again each second
                for number in range(len(running.all("store_down"))):
                    await running.record("store_up", number + 1)
            before = len(load.outcomes)
            await load.more("250")
            assert {said[:3] for _, said in load.outcomes[before + CLIENTS :]} == {"250"}
        assert {code[0] for code in load.said()} == {"2", answer[0]}, load.said()  # 451 where a session was at MAIL
        assert 1 <= len(running.all("store_down")) <= 2 and len(running.all("store_up")) <= 2
        assert len(running.all("stage_failure")) <= 2 and not running.all("internal_error")
        check_messages(sink, load)
