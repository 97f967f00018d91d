"""Asking the servers without a client: what they announce, before the first greeting, and how they do, all the time.

A probe goes as far as EHLO, LHLO, CAPABILITY or CAPA (behind TLS as the pool has it) and says QUIT or LOGOUT, so that
the server sees nothing odd in its log. Only what a probe itself met counts; a 421 is the answer of a server that is
well but busy.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from gateway.observe import metrics
from gateway.protocol.proxy_header import encode_v2_local
from gateway.protocol.smtp import Ehlo
from gateway.upstream.connection import UpstreamConnection, UpstreamError
from gateway.upstream.dial import FIRST_QUESTION, dial

if TYPE_CHECKING:
    from gateway.protocol.smtp import Reply
    from gateway.relay.tls import TlsInfo
    from gateway.upstream.pool import Pool, PoolSettings
    from gateway.upstream.server import Server

log = structlog.get_logger("gateway.upstream")

JITTER = 0.2
FIRST_RETRY = 1.0
LEARN_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class Profile:
    """What a probe found: greeting, the last EHLO (a store's capabilities, or those assumed), and TLS if there is."""

    greeting: Reply
    ehlo: Ehlo
    tls: TlsInfo | None


async def probe_server(
    server: Server,
    settings: PoolSettings,
    *,
    hostname: str,
    instance: str = "",
    proxy_header: bool = False,
    timeout: float | None = None,
) -> Profile:
    """Connect as a session would, up to EHLO, and say QUIT.

    `proxy_header`: the servers expect one, so that the probe sends that of a connection of our own (LOCAL, version 2).
    At most `timeout` seconds (default: the pool's health_timeout). Raises UpstreamError.
    """
    seconds = settings.health_timeout if timeout is None else timeout
    try:
        async with asyncio.timeout(seconds):
            connection = await dial(
                server,
                settings,
                hostname=hostname,
                instance=instance,
                preface=_local_header if proxy_header else None,
            )
    except TimeoutError:
        question = FIRST_QUESTION[server.protocol]
        raise UpstreamError("timeout", server.url, f"no {question} within {seconds:g}s") from None
    greeting, ehlo, tls = connection.greeting, connection.ehlo, connection.wire.tls
    connection.end_quietly()
    assert greeting is not None  # or dial had raised
    return Profile(greeting, ehlo or Ehlo("", connection.extensions), tls)


def _local_header(connection: UpstreamConnection) -> None:
    connection.wire.write(encode_v2_local())


class Health:
    """The active check of one pool: a task a server, in the worker that probes, from `start` to `stop`.

    A server is asked every `interval` seconds (give or take a fifth, so that several gateways do not ask in step).
    `health_fall` failures in a row take it out, and while it fails it is asked after 1, 2, 4 ... seconds;
    `health_rise` successes bring it back. While nothing is known of the pool, so that clients cannot be greeted, its
    servers are asked every second. `sleep` waits, for tests.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        hostname: str,
        instance: str = "",
        proxy_header: bool = False,
        interval: float | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.pool = pool
        self._hostname = hostname
        self._instance = instance
        self._proxy_header = proxy_header
        self._interval = pool.settings.health_interval if interval is None else interval
        self._sleep = sleep
        self._tasks: list[asyncio.Task[None]] = []
        self._learning: asyncio.Task[None] | None = None
        self._not_before = float("-inf")
        self._unwell: set[Server] = set()
        self._took = metrics.histogram("gateway_upstream_check_seconds", pipeline=pool.pipeline, pool=pool.name)
        pool.learner = self.learn

    def start(self, probing: bool = True) -> None:
        """From now on this worker watches every server of the pool, if the pool says so; or another worker does.

        Called again, it takes over from a worker that is gone, or leaves it to another one.
        """
        if probing is self.pool.probing:
            return
        self.pool.watch(probing)
        if not probing:
            self._cancel()
        elif self.pool.settings.health:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._watch(server)) for server in self.pool.servers]

    def _cancel(self) -> list[asyncio.Task[None]]:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        return tasks

    async def stop(self) -> None:
        """End all probes under way."""
        if self.pool.probing:
            self.pool.watch(False)
        tasks = self._cancel()
        if self._learning is not None:
            self._learning.cancel()
            tasks.append(self._learning)
        if tasks:
            await asyncio.wait(tasks)

    async def learn(self, timeout: float | None = None) -> None:
        """Ask every server once; sessions that want to know meanwhile wait for the same answer.

        At most once a second, so that clients which come while all is down cause no storm of probes.
        """
        loop = asyncio.get_running_loop()
        if self._learning is None:
            if loop.time() < self._not_before:
                return
            self._learning = loop.create_task(self._learn(timeout))
            self._learning.add_done_callback(self._learned)
        await asyncio.shield(self._learning)

    def _learned(self, task: asyncio.Task[None]) -> None:
        self._learning = None
        self._not_before = task.get_loop().time() + LEARN_PAUSE

    async def _learn(self, timeout: float | None) -> None:
        results = await asyncio.gather(*(self._probe(server, timeout) for server in self.pool.servers))
        for server, error in zip(self.pool.servers, results, strict=True):
            if error is None and self.pool.probing:
                self.pool.probed(server, "")
            elif error is None:
                self.pool.succeeded(server)  # whether it is down says the worker that watches it
            elif error.kind != "busy":
                self._unwell.add(server)
                log.warning("upstream_failure", pool=self.pool.name, server=server.url, kind=error.kind,
                            error=error.text)

    async def _probe(self, server: Server, timeout: float | None = None) -> UpstreamError | None:
        """One probe; what the server announces goes to the pool."""
        try:
            profile = await probe_server(
                server,
                self.pool.settings,
                hostname=self._hostname,
                instance=self._instance,
                proxy_header=self._proxy_header,
                timeout=timeout,
            )
        except UpstreamError as error:
            return error
        self.pool.learned(server, profile.ehlo)
        return None

    def _pause(self, fell: int, rising: bool) -> float:
        """Seconds to the next probe: short while it is not clear whether the server is well."""
        if rising or self.pool.profile() is None:
            return min(FIRST_RETRY, self._interval)
        return min(FIRST_RETRY * 2.0 ** min(fell - 1, 10), self._interval) if fell else self._interval

    async def _watch(self, server: Server) -> None:
        loop = asyncio.get_running_loop()
        fell, rose = int(server in self._unwell), 0
        self._unwell.discard(server)
        while True:
            await self._sleep(self._pause(fell, server.down and rose > 0) * random.uniform(1 - JITTER, 1 + JITTER))
            begun = loop.time()
            error = await self._probe(server)
            if error is None or error.kind == "busy":
                fell, rose = 0, rose + 1
                self._well(server, rose)
                self._count(server, "ok", "", loop.time() - begun)
                continue
            fell, rose = fell + 1, 0
            if fell >= self.pool.settings.health_fall and not server.down:
                log.warning("upstream_down", pool=self.pool.name, server=server.url, kind=error.kind, error=error.text)
                self.pool.probed(server, error.text)
            self._count(server, "failed", error.text, loop.time() - begun)

    def _well(self, server: Server, rose: int) -> None:
        """It answered `rose` checks in a row."""
        if not server.down or rose >= self.pool.settings.health_rise:
            if server.down:
                log.info("upstream_up", pool=self.pool.name, server=server.url)
            self.pool.probed(server, "")

    def _count(self, server: Server, result: str, error: str, seconds: float) -> None:
        self._took.observe(seconds)
        metrics.counter("gateway_upstream_checks_total", **self.pool.labels(server), result=result).add()
        self.pool.checked(server, error, seconds)


async def learn(health: Health, timeout: float) -> bool:
    """The first round, before the listeners open: whether anything is known of the pool's servers now.

    Servers of a pool without health checks are not asked before a session needs them.
    """
    if health.pool.settings.health:
        await health.learn(timeout)
    return health.pool.profile() is not None
