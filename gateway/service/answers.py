"""What a worker answers when the admin API asks: its sessions, pools, limits and bans, and what it does about them.

`Answers.answer` is the one door; each operation is a method of that name. What they give is plain JSON; the admin
process joins the answers of several workers (`gateway/admin/merge.py`). Secrets are in none of them.
"""

from __future__ import annotations

import ipaddress
import json
import os
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, cast

from gateway.admin.hub import Json
from gateway.frontend.conversation import Conversation
from gateway.observe import logs, recent
from gateway.observe.sinks import Level
from gateway.service import described
from gateway.state.keys import network_key
from gateway.state.store import Store, StoreError

if TYPE_CHECKING:
    from gateway.service.worker import ServedPipeline, Worker
    from gateway.stage import Stage
    from gateway.upstream.pool import Pool

Arguments = Mapping[str, Json]

LEVELS: Final = ("debug", "info", "notice", "warning", "error", "critical")
MOST_SESSIONS: Final = 10_000
MOST_ENTRIES: Final = 1_000
MOST_BANS: Final = 10_000
LONGEST_BAN: Final = 366 * 86_400  # seconds
HEAVIEST: Final = 1_000  # as in a pipeline file


class AnswerError(Exception):
    """The operation is refused; `status` is that of HTTP which says why, and the text begins with it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text}")
        self.status = status
        self.text = text


class Answers:
    """The operations of one worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._operations: dict[str, Callable[[Arguments], Awaitable[Json]]] = {
            "sessions": self.sessions, "session": self.session, "kill": self.kill, "upstreams": self.upstreams,
            "upstream": self.upstream, "limits": self.limits, "limits_clear": self.limits_clear,
            "auth_cache_clear": self.auth_cache_clear, "bans": self.bans, "ban_add": self.ban_add,
            "ban_remove": self.ban_remove, "log_level": self.log_level, "listeners": self.listeners,
            "pipelines": self.pipelines, "certs": self.certs, "stats": self.stats,
        }  # fmt: skip

    async def answer(self, op: str, args: Arguments) -> Json:
        """Do one operation. Raises AnswerError."""
        operation = self._operations.get(op)
        if operation is None:
            raise AnswerError(404, f"no operation {op!r}")
        try:
            return await operation(args)
        except StoreError as error:
            raise AnswerError(503, f"the store does not answer: {error}") from None

    # -- sessions

    async def sessions(self, args: Arguments) -> Json:
        """`{total, matched, sessions}`: at most `limit`, the youngest first.

        `pipeline`, `user` and `client` (an address or a network) choose.
        """
        limit = _number(args, "limit", 0, MOST_SESSIONS, 100)
        pipeline, user, client = (_text(args, name, "") for name in ("pipeline", "user", "client"))
        network = _network(client) if client else None
        found = [
            one
            for one in self._conversations()
            if (not pipeline or one.session.pipeline == pipeline)
            and (not user or one.session.user == user.lower())
            and (network is None or _inside(one.session.client.address, network))
        ]
        found.sort(key=lambda one: one.session.started, reverse=True)
        total = sum(len(served.conversations) for served in self.worker.pipelines)
        return {"total": total, "matched": len(found), "sessions": [described.row(one) for one in found[:limit]]}

    async def session(self, args: Arguments) -> Json:
        """All that is known of the session `id`, also for a while after its end; None if nothing is."""
        id = _text(args, "id").upper()
        records = cast(Json, recent.of(id))
        conversation = self._find(id)
        if conversation is not None:
            return {**described.whole(conversation), "log": records}
        return {"id": id, "state": "ended", "log": records} if records else None

    async def kill(self, args: Arguments) -> Json:
        """End the session `id`: `{id, state}`, ending or "after its message"; None if it is not here."""
        conversation = self._find(_text(args, "id").upper())
        if conversation is None:
            return None
        at_once = conversation.kill()
        return {"id": conversation.session.id, "state": "ending" if at_once else "after its message"}

    def _conversations(self) -> Iterator[Conversation]:
        for served in self.worker.pipelines:
            yield from served.conversations

    def _find(self, id: str) -> Conversation | None:
        return next((one for one in self._conversations() if one.session.id == id), None)

    # -- upstreams

    async def upstreams(self, args: Arguments) -> Json:
        """The pools of every pipeline; `dynamic` are those of servers that a stage named."""
        return [
            {"pipeline": served.plan.name, "dynamic": pool.name not in served.plan.pools, **pool.describe()}
            for served, pool in self._pools()
        ]

    async def upstream(self, args: Arguments) -> Json:
        """`action` drain, ready or weight (with `weight`) for `server` of `pool`: what it was done to.

        `server` is a URL, a host and port, or a host; `pipeline` chooses among pools of one name.
        """
        name, wanted, pipeline = _text(args, "pool"), _text(args, "server"), _text(args, "pipeline", "")
        action = _text(args, "action")
        if action not in ("drain", "ready", "weight"):
            raise AnswerError(400, f"action {action!r} is none of drain, ready, weight")
        weight = _number(args, "weight", 0, HEAVIEST) if action == "weight" else None
        pools = [(one, pool) for one, pool in self._pools() if pool.name == name and pipeline in ("", one.plan.name)]
        if not pools:
            known = sorted({pool.name for _, pool in self._pools()})
            raise AnswerError(404, f"no pool named {name}; there are: {', '.join(known) or 'none'}")
        urls = _meant(wanted, {server.url for _, pool in pools for server in pool.servers})
        if not urls:
            known = sorted({server.url for _, pool in pools for server in pool.servers})
            raise AnswerError(404, f"no server {wanted} in {name}; there are: {', '.join(known)}")
        if len(urls) > 1:
            raise AnswerError(409, f"{wanted} may be any of these: {', '.join(sorted(urls))}")
        (url,) = urls
        done = [served.plan.name for served, pool in pools if pool.administer(url, action, weight)]
        if not done:
            raise AnswerError(409, f"{name}: {url}: {action} is not possible now")
        return {"pool": name, "server": url, "action": action, "weight": weight, "pipelines": sorted(done)}

    def _pools(self) -> Iterator[tuple[ServedPipeline, Pool]]:
        for served in self.worker.pipelines:
            if served.served is not None:
                for pool in served.served.pools.every():
                    yield served, pool

    # -- what stages keep

    @property
    def _store(self) -> Store:
        if self.worker.store is None:
            raise AnswerError(503, "the worker is starting")
        return self.worker.store

    async def limits(self, args: Arguments) -> Json:
        """What is counted under keys that begin with `prefix`; of values only how long they are."""
        limit = _number(args, "limit", 1, MOST_ENTRIES, MOST_ENTRIES)
        entries = await self._store.entries(_text(args, "prefix", ""), limit)
        return [
            {
                "key": entry.key,
                "kind": entry.kind,
                "count": round(entry.count, 3),
                "size": len(entry.value) if entry.value is not None else 0,
                "expires": round(entry.expires, 3) if entry.expires is not None else None,
            }
            for entry in entries
        ]

    async def limits_clear(self, args: Arguments) -> Json:
        """Forget what is counted for `key`: whether there was anything."""
        return await self._store.clear(_text(args, "key"))

    async def auth_cache_clear(self, args: Arguments) -> Json:
        """Forget logins that were remembered as right, of `user` or of all: how many."""
        user = _text(args, "user", "")
        cleared = 0
        for _, stage in self._stages():
            clear = getattr(stage, "clear_cache", None)
            if clear is not None:
                cleared += clear(user)
        return cleared

    def _stages(self) -> Iterator[tuple[str, Stage]]:
        for served in self.worker.pipelines:
            for stage in served.plan.chain.stages:
                yield served.plan.name, stage

    async def bans(self, args: Arguments) -> Json:
        """All bans: `{pipeline, stage, network, until, seconds, level, reason, by}`, `until` in seconds since 1970."""
        entries = await self._store.entries("ban:", MOST_BANS)
        return [ban for ban in (_ban(entry.key, entry.value) for entry in entries) if ban is not None]

    async def ban_add(self, args: Arguments) -> Json:
        """Ban `network` for `seconds` (`reason`) in every pipeline with the stage `ban`: which those are, until when.

        `exempt` are those of them that let it in all the same, by a setting of that name. Only networks that the stage
        looks up: addresses, IPv6 /64, and those of its prefix lengths.
        """
        network = _network(_text(args, "network"))
        seconds = _number(args, "seconds", 1, LONGEST_BAN, 3600)
        until = round(time.time() + seconds, 3)
        value = {"until": until, "level": 0, "reason": _text(args, "reason", "")[:200], "by": "ctl"}
        done: list[str] = []
        exempt: list[str] = []
        for pipeline, stage in self._ban_stages():
            if any(_covers(one, network) for one in getattr(stage.settings, "exempt", ())):
                exempt.append(pipeline)
            prefixes = _looked_up(stage, network.version)
            if network.prefixlen not in prefixes:
                shown = ", ".join(f"/{length}" for length in sorted(prefixes))
                raise AnswerError(400, f"{network}: {stage.id} of {pipeline} bans IPv{network.version} by {shown}")
            done.append(pipeline)
        for pipeline, stage in self._ban_stages():
            await self._store.put(_ban_key(pipeline, stage, network), json.dumps(value).encode(), seconds)
        pipelines: list[Json] = [*sorted(set(done))]
        return {"network": _written(network), "until": until, "pipelines": pipelines, "exempt": [*sorted(set(exempt))]}

    async def ban_remove(self, args: Arguments) -> Json:
        """Lift the bans of exactly `network`: how many there were."""
        network = _network(_text(args, "network"))
        removed = 0
        for pipeline, stage in self._ban_stages():
            removed += await self._store.clear(_ban_key(pipeline, stage, network))
        return removed

    def _ban_stages(self) -> list[tuple[str, Stage]]:
        """Pipeline and stage. Raises AnswerError if there is none."""
        found = [(pipeline, stage) for pipeline, stage in self._stages() if type(stage).__name__ == "Ban"]
        if not found:
            raise AnswerError(409, "no pipeline has the stage `ban`, so nobody would look at it")
        return found

    # -- the worker

    async def log_level(self, args: Arguments) -> Json:
        """Log records of `level` and above; `default` is what the configuration says. The worker keeps it."""
        level = _text(args, "level")
        if level != "default" and level not in LEVELS:
            raise AnswerError(400, f"level {level!r} is none of default, {', '.join(LEVELS)}")
        logs.set_level(None if level == "default" else cast(Level, level))
        return {"level": level}

    async def listeners(self, args: Arguments) -> Json:
        """Every listener of every pipeline, with its sessions."""
        sessions = Counter((one.session.pipeline, one.session.listener.url) for one in self._conversations())
        return [
            {**described.listener(plan), "pipeline": name, "sessions": sessions[name, plan.url]}
            for name, plan in ((served.plan.name, plan) for served in self.worker.pipelines
                               for plan in served.plan.listeners)
        ]  # fmt: skip

    async def pipelines(self, args: Arguments) -> Json:
        """Every pipeline with its stages, and its sessions."""
        return [
            {**described.pipeline(served.plan), "sessions": len(served.conversations)}
            for served in self.worker.pipelines
        ]

    async def certs(self, args: Arguments) -> Json:
        """The certificates in use, each once, with the listeners that show it; times are seconds since 1970."""
        found: dict[tuple[str, str], dict[str, Json]] = {}
        for served in self.worker.pipelines:
            for plan in served.plan.listeners:
                for one in plan.tls.certificates() if plan.tls is not None else ():
                    facts = described.certificate(one)
                    known = found.setdefault((str(facts["chain"]), str(facts["serial"])), {**facts, "listeners": []})
                    cast("list[Json]", known["listeners"]).append(plan.url)
        return list(found.values())

    async def stats(self, args: Arguments) -> Json:
        """What the worker is, does and takes. Memory is in octets, `cpu` in seconds."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        states = Counter(described.state(one) for one in self._conversations())
        return {
            "pid": os.getpid(),
            "sessions": states.total(),
            "states": dict(states),
            "pipelines": {served.plan.name: len(served.conversations) for served in self.worker.pipelines},
            "cpu": round(used.ru_utime + used.ru_stime, 3),
            "memory": _resident(),
            "descriptors": _descriptors(),
        }


# -- arguments


def _text(args: Arguments, name: str, default: str | None = None) -> str:
    """An argument that is a text; without a default there must be one. Raises AnswerError."""
    value = args.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or (default is None and not value):
        raise AnswerError(400, f"{name} is missing" if value in (None, "") else f"{name} is not a text")
    return value


def _number(args: Arguments, name: str, least: int, most: int, default: int | None = None) -> int:
    """A whole number, also written as a text. Raises AnswerError."""
    value = args.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise AnswerError(400, f"{name} is not a number from {least} to {most}")
    return value


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _network(text: str) -> Network:
    """An address or a network; octets beyond the prefix are dropped. Raises AnswerError."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise AnswerError(400, f"{text!r} is neither an address nor a network") from None


def _written(network: Network) -> str:
    """As `network_key` writes it, which is how a store's keys have it."""
    return network_key(str(network.network_address), network.prefixlen, network.prefixlen)


def _inside(address: str, network: Network) -> bool:
    try:
        return ipaddress.ip_address(address) in network
    except ValueError:
        return False  # a local socket


def _meant(wanted: str, urls: set[str]) -> set[str]:
    """Which of the servers' URLs `wanted` names: one exactly, else by host and port or path, else by host."""
    if wanted in urls:
        return {wanted}
    places = {url: url.partition("://")[2] or url.partition("unix:")[2] for url in urls}
    by_place = {url for url, place in places.items() if place == wanted.lower() or place == wanted}
    return by_place or {url for url, place in places.items() if place.rpartition(":")[0] == wanted.lower()}


def _ban_key(pipeline: str, stage: Stage, network: Network) -> str:
    """As the stage `ban` has it (stages/ban.py)."""
    return f"ban:{pipeline}:{stage.id}:{_written(network)}"


def _looked_up(stage: Stage, version: int) -> set[int]:
    """Prefix lengths of the networks that a client is looked up by."""
    if version == 4:
        return {32, getattr(stage.settings, "v4_prefix", 32)}
    return {128, 64, getattr(stage.settings, "v6_prefix", 64)}


def _covers(one: Network, other: Network) -> bool:
    """Whether all of the other network is in this one."""
    if isinstance(one, ipaddress.IPv4Network):
        return isinstance(other, ipaddress.IPv4Network) and other.subnet_of(one)
    return isinstance(other, ipaddress.IPv6Network) and other.subnet_of(one)


def _ban(key: str, value: bytes | None) -> Json:
    """A ban as it is shown, or None for what is none."""
    parts = key.split(":", 3)  # IPv6 has more of them
    try:
        kept = json.loads(value or b"")
        until = float(kept["until"])
    except (ValueError, TypeError, KeyError):
        return None
    if len(parts) != 4 or until <= time.time():
        return None
    _, pipeline, stage, network = parts
    shown: dict[str, Json] = {"pipeline": pipeline, "stage": stage, "network": network, "until": until}
    shown["seconds"] = round(until - time.time(), 3)
    return {**shown, **{name: kept.get(name) for name in ("level", "reason", "by")}}


def _descriptors() -> int | None:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


def _resident() -> int | None:
    """Octets of memory in use now (proc(5) statm), None where that is not known."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
