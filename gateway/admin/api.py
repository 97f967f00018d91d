"""The admin API: JSON over HTTP, on a unix socket or with a token; and the metrics alone, for a listener of their own.

GET never changes anything. A request that cannot be granted is answered with `{"error": text}` and a status that says
why: 400 arguments, 401 no token, 403 a wrong one or a foreign Host, 404 unknown, 405 another method, 409 not possible,
413 too long, 422 the new configuration is none, 503 a process does not answer.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gateway.admin.asked import LARGEST_BODY
from gateway.admin.hub import Hub, Json
from gateway.admin.looking import Looking, live, metrics_of
from gateway.admin.merge import Refusal
from gateway.admin.steering import Steering
from gateway.observe.counters import CounterMap
from gateway.observe.logs import get_logger

log = get_logger("gateway.admin")


def application(
    hub: Hub, counters: CounterMap | None, token: str | None, *, hosts: Collection[str] = ()
) -> web.Application:
    """The whole API.

    Without a `token` everybody who can connect may do everything: for unix sockets only. With one each request must
    show it (RFC 6750 2.1), and its Host must be an address, localhost or one of `hosts`: a page that lets its name
    point here (DNS rebinding) has another. `counters` are those that /metrics shows.
    """
    guards: list[Middleware] = [] if token is None else [_host_guard(hosts), _token_guard(token)]
    app = web.Application(middlewares=[_answer_errors, *guards], client_max_size=LARGEST_BODY)
    app.add_routes([*Looking(hub, counters).routes(), *Steering(hub).routes()])
    return app


def metrics_application(counters: CounterMap) -> web.Application:
    """GET /metrics and /live, for whoever comes."""
    app = web.Application(middlewares=[_answer_errors], client_max_size=LARGEST_BODY)
    app.add_routes([web.get("/metrics", metrics_of(counters)), web.get("/live", live)])
    return app


def _error(status: int, text: str, more: dict[str, Json] | None = None) -> web.Response:
    return web.json_response({"error": text, **(more or {})}, status=status)


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as JSON."""
    try:
        return await handler(request)
    except Refusal as refusal:
        return _error(refusal.status, refusal.text, refusal.more)
    except web.HTTPMethodNotAllowed as error:
        response = _error(405, f"{request.path} takes {', '.join(sorted(error.allowed_methods))}")
        response.headers["Allow"] = error.headers["Allow"]
        return response
    except web.HTTPNotFound:
        return _error(404, f"nothing is at {request.path}")
    except web.HTTPRequestEntityTooLarge:
        return _error(413, f"the body is longer than {LARGEST_BODY} octets")
    except web.HTTPException as error:
        return _error(error.status, error.reason)
    except Exception as error:
        log.exception("internal_error", error=f"{request.method} {request.path}: {type(error).__name__}: {error}")
        return _error(500, "a fault of the gateway; its log says more")


def _token_guard(token: str) -> Middleware:
    expected = token.encode()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            response = _error(401, "show the token: Authorization: Bearer ...")
            response.headers["WWW-Authenticate"] = 'Bearer realm="gateway"'
            return response
        if not hmac.compare_digest(shown.strip().encode("utf-8", "surrogateescape"), expected):
            return _error(403, "the token is not the right one")
        return await handler(request)

    return guard


def _host_guard(hosts: Collection[str]) -> Middleware:
    known = {"localhost", *(host.lower() for host in hosts)}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = _host(request.headers.get("Host", ""))
        if host not in known and not _is_address(host):
            return _error(403, "the Host is not one of this gateway's")
        return await handler(request)

    return guard


def _host(written: str) -> str:
    """Host without its port (RFC 9110 7.2), lower-cased; an IPv6 address without brackets."""
    if written.startswith("["):
        return written[1:].partition("]")[0]
    return written.partition(":")[0].lower().rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
