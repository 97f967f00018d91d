"""The admin API's POST and DELETE: what changes the service. Each is logged with who asked for it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from typing import Final, cast

from aiohttp import web

from gateway.admin.asked import ask, ask_one, body, query
from gateway.admin.hub import Hub, Json, ReloadResult
from gateway.admin.merge import Refusal, given, missing, number
from gateway.observe.logs import get_logger

log = get_logger("gateway.admin")

_UCRED: Final = struct.Struct("3i")  # unix(7) SO_PEERCRED: pid, uid, gid


class Steering:
    """Handlers over a hub."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def routes(self) -> list[web.RouteDef]:
        """What is done where."""
        return [
            web.post("/reload", self.reload),
            web.post("/drain", self.drain),
            web.post("/stop", self.stop),
            web.post("/sessions/{id}/kill", self.kill),
            web.post("/upstreams/{pool}/{server:.+}", self.upstream),
            web.post("/log-level", self.log_level),
            web.post("/limits/clear", self.limits_clear),
            web.post("/auth-cache/clear", self.auth_cache_clear),
            web.post("/bans", self.ban),
            web.delete("/bans", self.unban),
        ]

    # -- the service

    async def reload(self, request: web.Request) -> web.Response:
        """Read the configuration again, and wait for what comes of it: 422 where the old one goes on."""
        await body(request, ())
        _record(request, "reload", {})
        found = await ask_one(self.hub, "reload", {}, "supervisor", timeout=None)
        result = cast(ReloadResult, found)
        if not result["ok"]:
            raise Refusal(422, result["error"] or "the reload failed", generation=result["generation"])
        return web.json_response({"generation": result["generation"]})

    async def drain(self, request: web.Request) -> web.Response:
        """Accept no more, serve what is open to its end, then stop."""
        await body(request, ())
        _record(request, "drain", {})
        await ask_one(self.hub, "drain", {}, "supervisor")
        return web.json_response({"state": "draining"}, status=202)

    async def stop(self, request: web.Request) -> web.Response:
        """Stop as at SIGTERM; with `now` without waiting for sessions."""
        args = await body(request, ("now",))
        now = args.get("now", False)
        if not isinstance(now, bool):
            raise Refusal(400, "now is neither true nor false")
        _record(request, "stop", {"now": now})
        await ask_one(self.hub, "stop", {"now": now}, "supervisor")
        return web.json_response({"state": "stopping"}, status=202)

    async def log_level(self, request: web.Request) -> web.Response:
        """Of all workers that run now."""
        args = await body(request, ("level",))
        _record(request, "log-level", args)
        answers = await ask(self.hub, "log_level", args, "workers")
        return web.json_response({**_mapping(given(answers)[0]["result"]), "missing": missing(answers)})

    # -- sessions and upstreams

    async def kill(self, request: web.Request) -> web.Response:
        """End a session, with its protocol's goodbye where that tears nothing apart."""
        await body(request, ())
        id = request.match_info["id"]
        _record(request, "kill", {"id": id})
        answers = given(await ask(self.hub, "kill", {"id": id}, "workers"))
        known = [answer["result"] for answer in answers if answer["result"] is not None]
        if not known:
            raise Refusal(404, f"no open session {id}")
        return web.json_response(known[0])

    async def upstream(self, request: web.Request) -> web.Response:
        """Drain a server, take it back, or change its weight; the server's URL stands in the path, escaped or not."""
        args = await body(request, ("action", "weight", "pipeline"))
        args |= {"pool": request.match_info["pool"], "server": request.match_info["server"]}
        _record(request, "upstream", args)
        answers = await ask(self.hub, "upstream", args, "workers")
        return web.json_response({**_mapping(given(answers)[0]["result"]), "missing": missing(answers)})

    # -- what stages keep

    async def limits_clear(self, request: web.Request) -> web.Response:
        """Forget what is counted for one key."""
        args = await body(request, ("key",))
        _record(request, "limits-clear", args)
        answers = given(await ask(self.hub, "limits_clear", args, "workers"))
        if not any(answer["result"] for answer in answers):
            raise Refusal(404, f"nothing is counted for {args['key']}")
        return web.json_response({"key": args["key"]})

    async def auth_cache_clear(self, request: web.Request) -> web.Response:
        """Forget remembered logins, of `user` or of all."""
        args = await body(request, ("user",))
        _record(request, "auth-cache-clear", args)
        answers = given(await ask(self.hub, "auth_cache_clear", args, "workers"))
        return web.json_response({"cleared": sum(int(number(answer["result"])) for answer in answers)})

    async def ban(self, request: web.Request) -> web.Response:
        """Ban a network."""
        args = await body(request, ("network", "seconds", "reason"))
        _record(request, "ban", args)
        return web.json_response(given(await ask(self.hub, "ban_add", args, "workers"))[0]["result"])

    async def unban(self, request: web.Request) -> web.Response:
        """Lift the bans of a network."""
        args = query(request, ("network",))
        _record(request, "unban", args)
        answers = given(await ask(self.hub, "ban_remove", args, "workers"))
        removed = sum(int(number(answer["result"])) for answer in answers)
        if not removed:
            raise Refusal(404, f"{args['network']} is not banned")
        return web.json_response({"removed": removed})


def _mapping(result: Json) -> dict[str, Json]:
    return dict(cast(Mapping[str, Json], result))


def _record(request: web.Request, action: str, args: Mapping[str, Json]) -> None:
    """One log record an action, before it is done: some end the process."""
    words = " ".join(f"{name}={value}" for name, value in sorted(args.items()) if value not in (None, ""))
    log.info("admin", action=action, args=words[:500] or None, by=_who(request))


def _who(request: web.Request) -> str:
    """The address of the other end, or the user id of the process there."""
    if request.remote:
        return request.remote
    sock = request.transport.get_extra_info("socket") if request.transport is not None else None
    if sock is None:
        return "unknown"
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return f"uid {uid}"
