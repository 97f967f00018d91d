"""A service that the admin API can ask, made up by the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, UnixConnector, web

from gateway.admin.api import application
from gateway.admin.hub import Answer, Json, Recipients
from gateway.admin.place import bound
from gateway.observe.counters import CounterMap

Who = tuple[int, int]


@dataclass
class FakeHub:
    """Answers by operation: a result for every worker (2.0, 2.1, 1.0), or by worker; a text that begins with a status,
    as `!404 text`, is a refusal, any other after `!` a silence. `asked` is what was asked."""

    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, Json], Recipients]] = field(default_factory=list)
    workers: tuple[Who, ...] = ((2, 0), (2, 1), (1, 0))

    async def ask(self, op: str, args: Mapping[str, Json], to: Recipients) -> list[Answer]:
        self.asked.append((op, dict(args), to))
        found = self.answers.get(op, f"!404 no operation {op}")
        who = {"workers": self.workers, "one": self.workers[:1], "supervisor": ((2, -1),)}[to]
        return [answer(one, found[one] if isinstance(found, dict) and one in found else found) for one in who]


def answer(who: Who, result: Json) -> Answer:
    error = result[1:] if isinstance(result, str) and result.startswith("!") else ""
    return Answer(generation=who[0], worker=who[1], result=None if error else result, error=error)


Served = Callable[..., AbstractAsyncContextManager[ClientSession]]


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def served(hub: FakeHub, tmp_path: Path) -> Served:
    """The API on a unix socket, and a client of it."""

    @asynccontextmanager
    async def serve(
        app: web.Application | None = None, *, token: str | None = None, counters: CounterMap | None = None
    ) -> AsyncIterator[ClientSession]:
        path = tmp_path / "admin.sock"
        runner = web.AppRunner(app or application(hub, counters, token, hosts=["gw.example.org"]), access_log=None)
        await runner.setup()
        await web.SockSite(runner, bound(f"unix:{path}")).start()
        try:
            async with ClientSession("http://localhost", connector=UnixConnector(str(path))) as client:
                yield client
        finally:
            await runner.cleanup()

    return serve
