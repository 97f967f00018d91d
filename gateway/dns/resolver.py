"""A stub resolver: asks recursive name servers, remembers what they said, keeps the kinds of failure apart.

Results are values, because a name that does not exist and a server that is silent lead to different replies, and
neither is an exception. Concurrent questions of the same kind are asked once. A question starts no task; one that
is cancelled leaves no socket behind, and whoever else waits for the same answer asks again.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from gateway.dns.transport import GarbageError, Question, Server, canonical, servers_of, system_servers
from gateway.protocol import dns
from gateway.protocol.errors import ProtocolError
from gateway.state.expiring import ExpiringDict

Reason = Literal["servfail", "refused", "garbage", "network", "timeout"]

CACHE_ENTRIES: Final = 10_000
MAX_TTL: Final = 86_400.0
MAX_NEGATIVE_TTL: Final = 300.0
"""Seconds for which a name counts as missing at most: senders retry while their DNS is being mended (RFC 2308)."""

NEGATIVE_TTL: Final = 30.0
"""The same where the answer does not say for how long."""

FAILURE_TTL: Final = 1.0
"""Seconds for which a failure is not asked again (RFC 9520 section 3.2)."""

RESEND_SECONDS: Final = 5.0
"""Seconds of one try at most."""

REST_SECONDS: Final = 30.0
"""Seconds for which a name server that did not answer is asked after the others."""

MAX_ALIASES: Final = 8
"""CNAMEs that are followed by questions of their own; those inside one answer cost nothing."""

MAX_NAMES: Final = 4
"""PTR names of one address that are looked at."""

MAX_QUESTIONS: Final = 500
"""Questions under way at a time, each with a descriptor; more wait within their time."""

_HOST_NAME: Final = re.compile(r"(?=.{1,255}\Z)[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*")
_WORST_FIRST: Final = ("servfail", "refused", "garbage", "network", "timeout")


@dataclass(frozen=True, slots=True)
class Found:
    """Records of the type asked for, and the seconds for which they are true."""

    records: tuple[dns.Record, ...]
    ttl: float


@dataclass(frozen=True, slots=True)
class NotFound:
    """The name does not exist (NXDOMAIN), or has no record of this type; and the seconds for which this is true."""

    ttl: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """Nobody knows: no server gave an answer."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class _Alias:
    """A CNAME whose target the answer does not tell."""

    target: str
    ttl: float


Result = Found | NotFound | Failed


@dataclass(frozen=True, slots=True)
class ReverseName:
    """What DNS says about an address.

    `name`: a name of the address which points back to it, None unless `status` is `ok`. `unverified`: its first PTR
    name, whether it points back or not. `status`: `unavailable` if there is no name or none that points back,
    `tempunavail` if that could not be found out, or the name is none that a log or a command could carry.
    """

    name: str | None
    unverified: str | None
    status: Literal["ok", "unavailable", "tempunavail"]


class Resolver:
    """Asks `servers` (address and port each; None: those of /etc/resolv.conf, read now).

    `timeout` is for one question with all its tries in seconds, `attempts` the tries for each server; they are more
    where the time is long, so that none waits longer than `RESEND_SECONDS` before the next. Questions go
    to the servers in turn, and to the next one where one does not answer; one that did not is passed over for
    `REST_SECONDS` while another does. `valid`: seconds for which an answer is believed, instead of its own TTL.
    `ipv4`, `ipv6`: whether `addresses` and `forward_confirmed` look for addresses of that family. Raises ValueError
    for what is not the address of a server.
    """

    def __init__(
        self,
        servers: Sequence[tuple[str, int]] | None = None,
        timeout: float = 5.0,
        attempts: int = 2,
        *,
        valid: float | None = None,
        ipv4: bool = True,
        ipv6: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._servers = system_servers() if servers is None else servers_of(servers)
        self._timeout = timeout
        self._attempts = max(attempts, math.ceil(timeout / (RESEND_SECONDS * len(self._servers))))
        self._clock = clock
        self._valid = valid
        self._types = tuple(qtype for qtype, wanted in ((dns.A, ipv4), (dns.AAAA, ipv6)) if wanted)
        self._turn = 0
        self._resting = [float("-inf")] * len(self._servers)
        self._cache: ExpiringDict[tuple[str, int], Result | _Alias] = ExpiringDict(CACHE_ENTRIES)
        self._flights: dict[tuple[str, int], list[asyncio.Future[Result | _Alias | None]]] = {}
        self._slots = asyncio.Semaphore(MAX_QUESTIONS)
        self._running: set[asyncio.Timeout] = set()
        self._closed = False

    def close(self) -> None:
        """End all questions under way as failed; later ones fail at once. Idempotent."""
        self._closed = True
        self._cache.clear()
        for timeout in self._running:
            timeout.reschedule(asyncio.get_running_loop().time())

    async def query(self, name: str, qtype: int) -> Result:
        """The records of `name` of type `qtype` (`dns.A`, ...), CNAMEs followed."""
        owner = canonical(name)
        seen: set[str] = set()
        ttl = MAX_TTL
        for _ in range(1 + MAX_ALIASES):
            seen.add(owner)
            result = await self._known(owner, qtype)
            if isinstance(result, Found):
                return Found(result.records, min(ttl, result.ttl))
            if isinstance(result, NotFound):
                return NotFound(min(ttl, result.ttl))
            if isinstance(result, Failed):
                return result
            ttl, owner = min(ttl, result.ttl), result.target
            if owner in seen:
                break
        return Failed("servfail")  # a CNAME that leads nowhere

    async def reverse(self, address: str) -> Result:
        """The PTR records of an IP address; CNAMEs are followed, as delegation of small networks needs (RFC 2317).

        Raises `LocalError` if it is no address.
        """
        return await self.query(dns.reverse_name(address), dns.PTR)

    async def addresses(self, name: str) -> Result:
        """The A and AAAA records of `name`, of the families that are wanted; Failed only if nothing was found."""
        results = await asyncio.gather(*(self.query(name, qtype) for qtype in self._types))
        found = [result for result in results if isinstance(result, Found)]
        if found:
            records = tuple(record for result in found for record in result.records)
            return Found(records, min(result.ttl for result in found))
        return next((result for result in results if isinstance(result, Failed)), results[-1])

    async def forward_confirmed(self, address: str) -> ReverseName:
        """The name of a client: PTR of its address, believed if the name has that address.

        An address that is none, such as a local socket's, gives `tempunavail` without a question. Where addresses
        of its family are not looked for, no name points back. Takes several questions' time at worst; the caller
        sets a limit.
        """
        try:
            packed = _packed(address)
        except ValueError:
            return ReverseName(None, None, "tempunavail")
        family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
        pointers = await self.reverse(socket.inet_ntop(family, packed))
        if not isinstance(pointers, Found):
            return ReverseName(None, None, "unavailable" if isinstance(pointers, NotFound) else "tempunavail")
        names = [str(record.data).removesuffix(".") for record in pointers.records[:MAX_NAMES]]
        names = [name for name in names if _HOST_NAME.fullmatch(name)]
        failed = not names
        qtype = dns.A if len(packed) == 4 else dns.AAAA
        for name in names if qtype in self._types else ():
            result = await self.query(name, qtype)
            if isinstance(result, Found) and any(_packed(str(record.data)) == packed for record in result.records):
                return ReverseName(name, names[0], "ok")
            failed = failed or isinstance(result, Failed)
        return ReverseName(None, names[0] if names else None, "tempunavail" if failed else "unavailable")

    async def _known(self, name: str, qtype: int) -> Result | _Alias:
        """From the cache, or from whoever is asking already, or from a server."""
        key = (name, qtype)
        while True:
            known = self._cache.get(key, self._clock())
            if known is not None:
                return known
            waiters = self._flights.get(key)
            if waiters is None:
                return await self._fly(key)
            landed: asyncio.Future[Result | _Alias | None] = asyncio.get_running_loop().create_future()
            waiters.append(landed)
            result = await landed
            if result is not None:  # None: who was asking was cancelled
                return result

    async def _fly(self, key: tuple[str, int]) -> Result | _Alias:
        """Ask, and tell everybody who asks the same meanwhile."""
        self._flights[key] = []
        result: Result | _Alias | None = None
        try:
            result, ttl = await self._ask(*key)
            now = self._clock()
            self._cache.put(key, result, now + ttl, now)
            return result
        finally:
            for landed in self._flights.pop(key):
                if not landed.done():
                    landed.set_result(result)

    async def _ask(self, name: str, qtype: int) -> tuple[Result | _Alias, float]:
        """Try the servers in turn; the result and the seconds to keep it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        tries = self._order() * self._attempts
        failures: set[Reason] = set()
        while tries and not self._closed and (left := deadline - loop.time()) > 0:
            index = tries.pop(0)
            answer = await self._try(self._servers[index], name, qtype, left / (len(tries) + 1))
            if not isinstance(answer, Failed):
                self._resting[index] = float("-inf")
                return self._believed(answer)
            failures.add(answer.reason)
            if answer.reason not in ("servfail", "refused"):  # that is said of the name, not of the server
                self._resting[index] = self._clock() + REST_SECONDS
            if answer.reason not in ("timeout", "garbage"):
                tries = [other for other in tries if other != index]  # it said no: asking again brings nothing
        if self._closed:
            return Failed("network"), 0.0
        return Failed(next((reason for reason in _WORST_FIRST if reason in failures), "timeout")), FAILURE_TTL

    def _order(self) -> list[int]:
        """The servers as they are asked: round robin, those that failed lately last."""
        now, count = self._clock(), len(self._servers)
        order = [(self._turn + i) % count for i in range(count)]
        self._turn = (self._turn + 1) % count
        return sorted(order, key=lambda index: self._resting[index] > now)

    def _believed(self, answer: Found | NotFound | _Alias) -> tuple[Result | _Alias, float]:
        """An answer with the TTL that counts, and that TTL."""
        if self._valid is not None:
            answer = replace(answer, ttl=self._valid)
        return answer, answer.ttl

    async def _try(self, server: Server, name: str, qtype: int, limit: float) -> Result | _Alias:
        """One try at one server, within `limit` seconds."""
        question = Question(server, name, qtype)
        try:
            async with asyncio.timeout(limit) as timeout:
                self._running.add(timeout)
                try:
                    async with self._slots:
                        answer = await question.ask()
                finally:
                    self._running.discard(timeout)
        except TimeoutError:
            return Failed("garbage" if question.garbage else "timeout")
        except GarbageError:
            return Failed("garbage")
        except OSError:
            return Failed("network")
        except ProtocolError:
            return NotFound()  # a name that cannot be asked is nobody's
        return _interpreted(answer, name, qtype)


def _interpreted(answer: dns.Answer, name: str, qtype: int) -> Result | _Alias:
    """What an answer says, CNAMEs inside it followed."""
    if answer.rcode not in (dns.NOERROR, dns.NXDOMAIN):
        return Failed("refused" if answer.rcode == dns.REFUSED else "servfail")
    owner, ttl = name, MAX_TTL
    for _ in answer.records:
        own = [record for record in answer.records if canonical(record.name) == owner]
        found = tuple([record for record in own if record.type == qtype])
        if found:
            return Found(found, min(ttl, *(record.ttl for record in found)))
        alias = next((record for record in own if record.type == dns.CNAME), None)
        if alias is None:
            break
        owner, ttl = canonical(str(alias.data)), min(ttl, alias.ttl)
    if owner != name and answer.rcode == dns.NOERROR:
        return _Alias(owner, ttl)
    return NotFound(NEGATIVE_TTL if answer.negative_ttl is None else min(answer.negative_ttl, MAX_NEGATIVE_TTL))


def _packed(address: str) -> bytes:
    """An address in network order, IPv4 in IPv6 clothes as IPv4. Raises ValueError."""
    try:
        if ":" not in address:
            return socket.inet_pton(socket.AF_INET, address)
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except OSError:
        raise ValueError("not an IP address") from None
    return packed[12:] if packed.startswith(bytes(10) + b"\xff\xff") else packed
