"""A pool: which of its servers the next connection goes to, and which are left alone for a while.

Selection never opens a connection; the prelude and the probe report how opening one went (`failed`,
`succeeded`, `probed`). What the servers announced is merged into the pool's profile in `profile.py`.
Workers have one view of the servers: what one finds out it tells the others (`Pool.news`, `Pool.apply`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from gateway.observe import metrics
from gateway.protocol.smtp import Ehlo
from gateway.upstream.balance import Balance
from gateway.upstream.description import Json, describe_server
from gateway.upstream.dial import tls_context
from gateway.upstream.line import Line
from gateway.upstream.places import Places, Waiting
from gateway.upstream.pool_settings import PoolSettings, TlsPolicy
from gateway.upstream.profile import ProfileStore, parse_keywords, shared_keywords
from gateway.upstream.server import Server, parse_server

if TYPE_CHECKING:
    from gateway.session import Session

__all__ = ["News", "Pool", "PoolBusy", "PoolDown", "PoolSettings", "PoolUnavailable", "Pools", "TlsPolicy"]

News = dict[str, Json]
"""What a worker found out of a server, for the others: `kind`, `url`, and what `Pool.apply` reads of that kind."""

FIRST_BACK_OFF = 1.0
LONGEST_BACK_OFF = 60.0
REST_SECONDS = 1.0
TELL_SECONDS = 1.0
DYNAMIC_POOLS = 1024
HEAVIEST = 1000


class PoolUnavailable(Exception):
    """No server can be given; the text says why."""


class PoolDown(PoolUnavailable):
    """Every server is down, ejected or was tried already."""


class PoolBusy(PoolUnavailable):
    """Every server has all the connections it may have, and waiting did not help."""


class Pool:
    """A named group of servers.

    `clock` is seconds that only grow and that all workers have in common (CLOCK_MONOTONIC), `store` remembers what
    servers announced. `pipeline` and `name` are what the pool has in common with those of other workers; a `dynamic`
    one is of this worker alone and has no series of its own. `learner` (the health check's) asks the servers now,
    `probing` while this worker does so all the time, `keeping` while connections may be kept for reuse. `news` is
    called with what other workers are to `apply`. Raises ValueError for settings that cannot work.
    """

    def __init__(
        self,
        name: str,
        settings: PoolSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        store: ProfileStore | None = None,
        pipeline: str = "",
        dynamic: bool = False,
    ) -> None:
        if not settings.servers:
            raise ValueError(f"pool {name}: no servers")
        self.name = name
        self.settings = settings
        self.servers = [Server(url, weight) for url, weight in settings.servers]
        self.protocol = self.servers[0].protocol
        if any(server.protocol != self.protocol for server in self.servers):
            raise ValueError(f"pool {name}: its servers speak different protocols")
        for server in self.servers:
            verified = settings.verify and (server.implicit_tls or settings.tls == "required")
            if verified and server.target.path and settings.server_name is None:
                raise ValueError(f"{server.url}: a socket has no name to verify; write server_name or verify: false")
        if settings.ca_file is not None:
            tls_context(settings.ca_file, True)  # so that a file that is none is found now
        self._clock = clock
        self._store = store
        self._balance = Balance(settings.balance, settings.slow_start)
        self.pipeline = pipeline
        self.dynamic = dynamic
        self._count()
        self.news: Callable[[News], None] | None = None
        self.probing = False
        self._asked_at = float("-inf")
        self.learner: Callable[[], Awaitable[None]] | None = None
        self.keeping = True
        self._assumed = None if settings.assume is None else parse_keywords(settings.assume)
        self._profile: dict[str, str] | None = None
        self._merge()

    def _count(self) -> None:
        labels = {"pipeline": self.pipeline, "pool": metrics.DYNAMIC if self.dynamic else self.name}
        for server in self.servers:
            theirs = {**labels, "server": metrics.DYNAMIC if self.dynamic else server.url}
            server.places = Places(server, theirs, not self.dynamic)
            server.ejections = metrics.counter("gateway_upstream_ejections_total", **theirs)
        self._line = Line(self._take, self.release, Waiting(labels, not self.dynamic), self._clock)
        self._late = metrics.counter("gateway_upstream_queue_timeouts_total", **labels)

    def labels(self, server: Server) -> dict[str, str]:
        """What names a server of a pool that is not `dynamic` in the metrics."""
        return {"pipeline": self.pipeline, "pool": self.name, "server": server.url}

    # --- selection

    async def acquire(self, session: Session, exclude: Collection[Server] = ()) -> Server:
        """A server for one more connection; give it back with `release`.

        `exclude` are servers this session tried already. Waits in line while all are full. Raises PoolDown (at
        once) and PoolBusy (line too long, or waited `queue_timeout`).
        """
        if not any(server.available(self._clock()) for server in self.servers if server not in exclude):
            raise PoolDown(self._why_down(exclude))
        if self._line:
            self._line.serve()
        if not self._line or exclude:
            server = self._take(session, exclude)
            if server is not None:
                return server
        self._ask_for_idle()
        limit, waiting = self.settings.max_connections, self._line.everywhere
        if waiting >= self.settings.queue:
            raise PoolBusy(f"pool {self.name}: every server has {limit} connections "
                           f"and {waiting} sessions wait already")
        seconds = self.settings.queue_timeout
        late = PoolBusy(f"pool {self.name}: no connection became free within {seconds:g}s")
        try:
            return await self._line.wait(session, exclude, seconds, late)
        except PoolBusy:
            self._late.add()
            raise

    def release(self, server: Server) -> None:
        """A connection from `acquire` is over (or idle); the first in line that can use the place gets it."""
        held = server.active
        server.active = held - 1
        server.places.free()
        if server.idle and self._line.everywhere > len(self._line):
            server.close_idle()  # other workers wait for the places
        if self._line and not self._line.gives_way(held, self.settings.max_connections):
            self._line.serve()

    def _take(self, session: Session, exclude: Collection[Server]) -> Server | None:
        """A place at the server that the balance names among those that may take one more, or None."""
        now = self._clock()
        limit = self.settings.max_connections
        free = [s for s in self.servers if s.active < limit and s.available(now) and s not in exclude]
        while free:
            server = self._balance.choose(free, session, now)
            if server.places.take(limit):
                server.active += 1
                return server
            free.remove(server)  # other workers have the rest
        return None

    def _ask_for_idle(self) -> None:
        """Connections that other workers only keep are in the way of sessions that wait; once a second is enough."""
        now = self._clock()
        if now - self._asked_at < TELL_SECONDS:
            return
        self._asked_at = now
        for server in self.servers:
            if server.places.idle_elsewhere():
                self._tell("crowded", server)

    # --- health

    def failed(self, server: Server, error: str, *, slow: bool = False) -> None:
        """Connect, TLS, greeting or EHLO failed.

        Ejects the server, longer with each failure in a row, but never more than half of the pool: beyond that it
        rests a second if finding out took long (`slow`), so that not every session waits for the same silence.
        """
        now = self._clock()
        server.last_error = error
        if server.ejected_until > now:
            return  # sessions that began before the ejection tell nothing new
        server.failures += 1
        back_off = min(FIRST_BACK_OFF * 2.0 ** min(server.failures - 1, 10), LONGEST_BACK_OFF)
        if self._eject(server, now, now + back_off):
            server.ejections.add()
            if now - server.told_at >= TELL_SECONDS:
                server.told_at, server.ejection_told = now, True
                self._tell("ejection", server, error=error, failures=server.failures, until=server.ejected_until)
        elif slow:
            server.resting_until = now + REST_SECONDS
        self._dismiss_waiters()

    def _eject(self, server: Server, now: float, until: float) -> bool:
        """Nobody goes there before `until`, unless it is one too many."""
        if 2 * sum(not other.available(now) for other in self.servers if other is not server) + 2 > len(self.servers):
            return False
        server.ejected_until, server.changed = until, now
        self._report(server)
        return True

    def succeeded(self, server: Server) -> None:
        """The server answered connect, TLS, greeting and EHLO."""
        if server.failures:
            told = server.ejection_told
            self._recover(server)
            if told:
                self._tell("ejection", server, until=None)

    def _recover(self, server: Server) -> None:
        now = self._clock()
        if server.ejection_told or server.ejected_until > now:
            server.changed = now
        server.failures = 0
        server.last_error = ""
        server.ejection_told = False
        server.ejected_until = min(server.ejected_until, now)
        server.resting_until = float("-inf")
        self._report(server)
        self._line.serve()

    def probed(self, server: Server, error: str) -> None:
        """The health check's word (empty: healthy); unlike sessions it may take the last server out."""
        now = self._clock()
        if error:
            if not server.down:
                server.down, server.changed = True, now
            server.last_error = error
            self._dismiss_waiters()
        elif server.down:
            server.down, server.changed = False, now
            server.ejected_until = now  # it returns slowly
            self._recover(server)
        elif server.failures:
            self._recover(server)
        self._report(server)

    def checked(self, server: Server, error: str, seconds: float) -> None:
        """One check is over: tell the other workers what it found, and how the server is seen here now.

        They hear of each, so that one which missed some is right after the next.
        """
        server.latency = seconds
        keywords = None if server.ehlo is None else dict(server.ehlo.keywords)
        why = server.last_error if server.down else error
        self._tell("check", server, down=server.down, error=why, seconds=seconds, keywords=keywords)

    def watch(self, probing: bool) -> None:
        """Whether this worker is the one that probes, and says in the metrics which servers are up."""
        self.probing = probing
        for server in self.servers:
            if server.up is not None:
                server.up.set(0)
            server.up = metrics.gauge("gateway_upstream_up", **self.labels(server)) if probing else None
            self._report(server)

    def _report(self, server: Server) -> None:
        """An ejected server is down until it has answered again."""
        if server.up is not None:
            server.up.set(not server.down and not (server.failures and server.ejected_until > float("-inf")))

    def _dismiss_waiters(self) -> None:
        """Nobody waits for a pool that is down."""
        now = self._clock()
        if self._line and not any(server.available(now) for server in self.servers):
            self._line.dismiss(PoolDown(self._why_down(())))

    def _why_down(self, exclude: Collection[Server]) -> str:
        rest = [server for server in self.servers if server not in exclude]
        if rest and not any(server.in_service for server in rest):
            return f"pool {self.name}: drained by the administrator"
        reasons = [
            f"{s.url}: {(s.last_error or 'down') if s.in_service else 'drained by the administrator'}" for s in rest
        ]
        return f"pool {self.name}: " + ("; ".join(reasons) or "every server was tried")

    # --- the other workers

    def _tell(self, kind: str, server: Server, **facts: Json) -> None:
        if self.news is not None:
            self.news({"kind": kind, "url": server.url, **facts})

    def apply(self, news: Mapping[str, Json]) -> None:
        """What another worker found out, with no need to find out the same here. What is unknown is ignored.

        `check`: a server was asked. `ejection`: sessions met a failure, or (`until` None) a success after it.
        `administered`: see `administer`. `crowded`: sessions of another worker wait for what is only kept here.
        """
        for server in self.servers:
            if server.url == news.get("url"):
                match news.get("kind"):
                    case "check":
                        self._apply_check(server, news)
                    case "ejection":
                        self._apply_ejection(server, news)
                    case "administered":
                        self._set(server, bool(news.get("drained")), int(_number(news.get("weight"), server.weight)))
                    case "crowded":
                        server.close_idle()

    def _apply_check(self, server: Server, news: Mapping[str, Json]) -> None:
        keywords, error = news.get("keywords"), str(news.get("error", ""))
        server.latency = _number(news.get("seconds"), 0.0)
        if isinstance(keywords, Mapping):
            self.learned(server, Ehlo("", {keyword: str(text) for keyword, text in keywords.items()}))
        if news.get("down"):
            self.probed(server, error or "down")
        elif not error:
            self.probed(server, "")

    def _apply_ejection(self, server: Server, news: Mapping[str, Json]) -> None:
        now = self._clock()
        if news.get("until") is None:
            if server.failures:
                self._recover(server)
            return
        until = min(_number(news.get("until"), now), now + LONGEST_BACK_OFF)
        if until > max(now, server.ejected_until) and self._eject(server, now, until):
            server.failures = max(server.failures, int(_number(news.get("failures"), 1)))
            server.last_error = str(news.get("error", ""))
            server.ejection_told = True  # so that all hear of it when this worker meets a success first
            self._report(server)
            self._dismiss_waiters()

    # --- the administrator

    def administer(self, url: str, action: str, weight: int | None = None) -> bool:
        """Set a server's state as HAProxy's `set server state` and `set weight` do; False for an unknown server.

        `drain`: no new sessions, those that are there go on, and so do health checks. `ready`: back at once, with its
        weight; down or ejected it stays. `weight`: 0 to 1000, effective from the next session on; with 0 the server
        gets no new sessions, and whatever a hash kept with it returns with the next weight. Raises ValueError for
        another action or weight.
        """
        if action not in ("drain", "ready", "weight"):
            raise ValueError(f"{action!r} is none of drain, ready, weight")
        if action == "weight" and (weight is None or not 0 <= weight <= HEAVIEST):
            raise ValueError(f"weight {weight}: 0 to {HEAVIEST} can be set")
        try:
            target = parse_server(url, self.protocol)
        except ValueError:
            return False
        found = [server for server in self.servers if server.target.same_place(target)]
        for server in found:
            drained = server.drained if action == "weight" else action == "drain"
            self._set(server, drained, server.weight if action != "weight" or weight is None else weight)
            self._tell("administered", server, drained=server.drained, weight=server.weight)
        return bool(found)

    def _set(self, server: Server, drained: bool, weight: int) -> None:
        server.drained, server.weight = drained, weight
        if server.in_service:
            self._line.serve()
        else:
            server.close_idle()
            self._dismiss_waiters()

    def describe(self) -> dict[str, Json]:
        """The pool in plain JSON, for the administrator; see `describe_server` for its servers."""
        now = self._clock()
        return {
            "name": self.name,
            "protocol": self.protocol,
            "balance": self.settings.balance,
            "max_connections": self.settings.max_connections,
            "health": self.settings.health and not self.dynamic,
            "waiting": len(self._line),
            "servers": [describe_server(server, now, self._balance.share(server, now)) for server in self.servers],
        }

    # --- what the servers announce

    def learned(self, server: Server, ehlo: Ehlo) -> None:
        """The server's EHLO or capabilities in the gateway's own state: after TLS, before it speaks for a client."""
        if self._assumed is not None or (server.ehlo is not None and server.ehlo.keywords == ehlo.keywords):
            return
        server.ehlo = ehlo
        if self._store is not None:
            self._store.put(server.url, ehlo.keywords)
        self._merge()

    def profile(self) -> dict[str, str] | None:
        """What every server of the pool announces, or what is assumed of them; None while nothing is known."""
        return None if self._profile is None else dict(self._profile)

    async def learn(self) -> bool:
        """Ask the servers now what they announce, if nothing is known yet; whether something is known then."""
        if self._profile is None and self.learner is not None:
            await self.learner()
        return self._profile is not None

    def _merge(self) -> None:
        self._profile = self._assumed if self._assumed is not None else shared_keywords(list(self._known()))

    def _known(self) -> Iterable[Mapping[str, str]]:
        for server in self.servers:
            keywords = None
            if server.ehlo is not None:
                keywords = server.ehlo.keywords
            elif self._store is not None:
                keywords = self._store.get(server.url)
            if keywords is not None:
                yield keywords

    def close_idle(self) -> None:
        """End the connections kept for reuse, and keep none from now on (at a stop): other workers need the places."""
        self.keeping = False
        for server in self.servers:
            server.close_idle()

    def __repr__(self) -> str:
        return f"<Pool {self.name} {len(self.servers)} servers>"


def _number(value: Json, default: float) -> float:
    return value if isinstance(value, int | float) else default


class Pools(dict[str, Pool]):
    """The pools of a pipeline by name, and pools of one for servers that an auth server names."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        *,
        dynamic: PoolSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(pools)
        self._dynamic: OrderedDict[tuple[str, str], Pool] = OrderedDict()
        self._settings = dynamic or PoolSettings()
        self._clock = clock

    def server(self, url: str, protocol: str = "smtp") -> Pool:
        """The pool of one for this server, made at first use; a bare address is that of a server of `protocol`.

        A server that a named pool lists too gets that pool's settings, so that naming it does not lose the TLS
        asked for. Raises ValueError for a URL that is none.
        """
        key = (url, protocol)
        pool = self._dynamic.get(key)
        if pool is not None:
            self._dynamic.move_to_end(key)
            return pool
        target = parse_server(url, protocol)
        settings, address = self._settings, str(target)
        for known in self.values():
            for server in known.servers:
                if server.url == address or (server.target.same_place(target) and "://" not in url):
                    settings, address = known.settings, server.url
        pipeline = next((known.pipeline for known in self.values()), "")
        own = replace(settings, servers=((address, 1),))
        pool = Pool(address, own, clock=self._clock, pipeline=pipeline, dynamic=True)
        self._dynamic[key] = pool
        if len(self._dynamic) > DYNAMIC_POOLS:
            self._forget_one()
        return pool

    def _forget_one(self) -> None:
        """Drop the one not asked for longest that nothing uses; sessions keep theirs anyway."""
        for key, pool in self._dynamic.items():
            if all(server.active == 0 for server in pool.servers):
                pool.close_idle()
                del self._dynamic[key]
                return

    def close_idle(self) -> None:
        """End the connections kept for reuse in every pool."""
        for pool in self.every():
            pool.close_idle()

    def every(self) -> Iterable[Pool]:
        """All pools, those of one server too."""
        return (*self.values(), *self._dynamic.values())
