"""The process that answers the admin API and serves the metrics: it accepts no mail and has no rights that a worker
has not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping, Sequence

from aiohttp import web

from gateway.admin.api import application, metrics_application
from gateway.admin.hub import Answer, Recipients
from gateway.observe.counters import CounterMap, CounterRow
from gateway.service.channel import Channel, Json, Message
from gateway.service.child import Child

ANSWER_SECONDS = 5.0
RELOAD_SECONDS = 120.0
LINGER_SECONDS = 2.0  # for answers under way, such as that to a reload


class AdminProcess(Child):
    """The API's side of the channel: a `Hub`."""

    def __init__(
        self,
        admin: Sequence[socket.socket],
        metrics: Sequence[socket.socket],
        map: CounterMap,
        token: str | None,
        channel: Channel,
        row: CounterRow,
        drain: float,
    ) -> None:
        super().__init__(channel, row, drain)
        self._admin = admin
        self._metrics = metrics
        self._map = map
        self._token = token
        self._runners: list[web.AppRunner] = []
        self._asked: dict[int, asyncio.Future[list[Answer]]] = {}
        self._number = 0

    async def prepare(self) -> None:
        """The applications, not yet listening."""
        applications = []
        if self._admin:
            applications.append((application(self, self._map, self._token), self._admin))
        if self._metrics:
            applications.append((metrics_application(self._map), self._metrics))
        self._sites: list[web.SockSite] = []
        for app, sockets in applications:
            runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=LINGER_SECONDS)
            await runner.setup()
            self._runners.append(runner)
            self._sites += [web.SockSite(runner, sock) for sock in sockets]

    async def accept(self) -> None:
        """Open the doors."""
        for site in self._sites:
            await site.start()

    async def close(self) -> None:
        """Answer what is asked already, then end."""
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS + 1):
                await asyncio.gather(*(runner.cleanup() for runner in self._runners))

    async def ask(self, op: str, args: Mapping[str, Json], to: Recipients) -> list[Answer]:
        """Of the other processes, by way of the supervisor."""
        self._number += 1
        number = self._number
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        self.channel.send({"op": "ask", "id": number, "name": op, "args": args, "to": to})
        try:
            async with asyncio.timeout(RELOAD_SECONDS if op == "reload" else ANSWER_SECONDS):
                return list(await future)
        except TimeoutError:
            return [Answer(generation=0, worker=-1, result=None, error="the supervisor did not answer in time")]
        finally:
            self._asked.pop(number, None)

    def heard(self, message: Message) -> None:
        """An answer."""
        if message["op"] != "answers":
            return
        future = self._asked.get(int(str(message["id"])))
        answers = message["answers"]
        if future is not None and not future.done() and isinstance(answers, list):
            future.set_result(answers)
