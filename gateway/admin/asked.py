"""What the handlers of the admin API have in common: arguments of a request, questions to the other processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping
from typing import Final

from aiohttp import web

from gateway.admin.hub import Answer, Hub, Json, Recipients
from gateway.admin.merge import Refusal, given

ANSWER_SECONDS: Final = 10.0
LARGEST_BODY: Final = 64 * 1024


async def ask(
    hub: Hub, op: str, args: Mapping[str, Json], to: Recipients, *, timeout: float | None = ANSWER_SECONDS
) -> list[Answer]:
    """Ask, within `timeout` seconds. Raises Refusal (503)."""
    try:
        async with asyncio.timeout(timeout):
            return await hub.ask(op, args, to)
    except TimeoutError:
        raise Refusal(503, f"no answer within {timeout:g} seconds") from None


async def ask_one(
    hub: Hub, op: str, args: Mapping[str, Json], to: Recipients, *, timeout: float | None = ANSWER_SECONDS
) -> Json:
    """The one result of a question to one process. Raises Refusal."""
    return given(await ask(hub, op, args, to, timeout=timeout))[0]["result"]


def query(request: web.Request, names: Collection[str]) -> dict[str, Json]:
    """The request's arguments. Raises Refusal for others than `names`."""
    return _only(dict(request.query), names)


async def body(request: web.Request, names: Collection[str]) -> dict[str, Json]:
    """The JSON object that was sent, whatever its Content-Type; empty if nothing was. Raises Refusal."""
    data = await request.read()
    if not data.strip():
        return {}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the body is not a JSON object")
    return _only(found, names)


def _only(arguments: dict[str, Json], names: Collection[str]) -> dict[str, Json]:
    for name in arguments:
        if name not in names:
            known = f"there are: {', '.join(sorted(names))}" if names else "there are none"
            raise Refusal(400, f"unknown argument {name[:60]!r}; {known}")
    return arguments
