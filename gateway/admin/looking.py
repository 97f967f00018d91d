"""The admin API's GET: what the service is doing. Nothing here changes anything."""

from __future__ import annotations

import platform
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from importlib.metadata import version
from typing import cast

from aiohttp import web

from gateway.admin import merge
from gateway.admin.asked import ask, ask_one, query
from gateway.admin.hub import Hub, Json
from gateway.admin.merge import Refusal
from gateway.observe import metrics
from gateway.observe.counters import CounterMap

ACCEPTING = ("serving", "reloading")
SHOWN_SESSIONS = 100


class Looking:
    """Handlers over a hub and the service's counters."""

    def __init__(self, hub: Hub, counters: CounterMap | None) -> None:
        self.hub = hub
        self.counters = counters

    def routes(self) -> list[web.RouteDef]:
        """What is asked where."""
        found = [
            web.get("/ready", self.ready),
            web.get("/live", live),
            web.get("/info", self.info),
            web.get("/pipelines", self.pipelines),
            web.get("/listeners", self.listeners),
            web.get("/upstreams", self.upstreams),
            web.get("/sessions", self.sessions),
            web.get("/sessions/{id}", self.session),
            web.get("/stats", self.stats),
            web.get("/certs", self.certs),
            web.get("/generations", self.generations),
            web.get("/limits", self.limits),
            web.get("/bans", self.bans),
        ]
        return found if self.counters is None else [*found, web.get("/metrics", metrics_of(self.counters))]

    async def ready(self, request: web.Request) -> web.Response:
        """Whether new connections are accepted: 200, or 503 with the reason."""
        status = await self._status()
        shown: dict[str, Json] = {name: status[name] for name in ("state", "generation", "reason")}
        if status["state"] in ACCEPTING:
            return web.json_response({"ready": True, **shown})
        text = f"{status['state']}: {status['reason']}" if status["reason"] else str(status["state"])
        raise Refusal(503, text, ready=False, **shown)

    async def info(self, request: web.Request) -> web.Response:
        """Versions, the supervisor and its workers."""
        status = await self._status()
        seconds = round(time.time() - merge.number(status["started"]), 3)
        return web.json_response({**versions(), **status, "seconds": seconds})

    async def pipelines(self, request: web.Request) -> web.Response:
        """The pipelines of the newest generation."""
        found = merge.summed(await ask(self.hub, "pipelines", {}, "workers"), "name")
        return web.json_response({"pipelines": found})

    async def listeners(self, request: web.Request) -> web.Response:
        """Their listeners."""
        found = merge.summed(await ask(self.hub, "listeners", {}, "workers"), "pipeline", "url")
        return web.json_response({"listeners": found})

    async def upstreams(self, request: web.Request) -> web.Response:
        """Pools and their servers."""
        answers = await ask(self.hub, "upstreams", {}, "workers")
        return web.json_response({"upstreams": merge.upstreams(answers), "missing": merge.missing(answers)})

    async def sessions(self, request: web.Request) -> web.Response:
        """Open sessions, the youngest first."""
        args = query(request, ("pipeline", "user", "client", "limit"))
        args.setdefault("limit", str(SHOWN_SESSIONS))
        answers = await ask(self.hub, "sessions", args, "workers")
        merge.given(answers)  # a limit that is none is refused there
        return web.json_response(merge.sessions(answers, int(str(args["limit"]))))

    async def session(self, request: web.Request) -> web.Response:
        """One session."""
        id = request.match_info["id"]
        answers = merge.given(await ask(self.hub, "session", {"id": id}, "workers"))
        known = [answer for answer in answers if answer["result"] is not None]
        if not known:
            raise Refusal(404, f"no session {id} is open or ended lately; the log may have it")
        answer = known[0]
        found = dict(cast(Mapping[str, Json], answer["result"]))
        return web.json_response({**found, "worker": answer["worker"], "generation": answer["generation"]})

    async def stats(self, request: web.Request) -> web.Response:
        """Numbers."""
        found = merge.stats(await ask(self.hub, "stats", {}, "workers"))
        totals = self.counters.totals() if self.counters is not None else {}
        return web.json_response({**found, "counters": merge.counters(totals)})

    async def certs(self, request: web.Request) -> web.Response:
        """Certificates that clients are shown."""
        found = merge.certificates(await ask(self.hub, "certs", {}, "one"))
        return web.json_response({"certificates": found})

    async def generations(self, request: web.Request) -> web.Response:
        """Generations that have processes, and the last that failed."""
        return web.json_response({"generations": await ask_one(self.hub, "generations", {}, "supervisor")})

    async def limits(self, request: web.Request) -> web.Response:
        """What limits have counted."""
        args = query(request, ("prefix", "limit"))
        return web.json_response({"limits": await ask_one(self.hub, "limits", args, "one")})

    async def bans(self, request: web.Request) -> web.Response:
        """Who is banned."""
        return web.json_response({"bans": await ask_one(self.hub, "bans", {}, "one")})

    async def _status(self) -> Mapping[str, Json]:
        return cast(Mapping[str, Json], await ask_one(self.hub, "status", {}, "supervisor"))


@cache
def versions() -> dict[str, Json]:
    """The gateway's and Python's."""
    return {"version": version("mail-gateway"), "python": platform.python_version()}


async def live(request: web.Request) -> web.Response:
    """The process answers; nobody else is asked."""
    return web.json_response({"live": True})


def metrics_of(counters: CounterMap) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler that gives the counters to Prometheus."""

    async def handler(request: web.Request) -> web.Response:
        text = metrics.exposition(counters.totals())
        return web.Response(body=text.encode(), headers={"Content-Type": metrics.CONTENT_TYPE})

    return handler
