"""Which Redis server a key belongs to: the only one, the one the sentinels call master, or a node of a cluster.

A cluster's nodes are learned from any of them (CLUSTER SLOTS), again whenever a node says that a slot has moved and,
while one is away, every second, since a replica may have taken its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Protocol

from redis.asyncio.connection import AbstractConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, ResponseError

from gateway.state import redis_line
from gateway.state.redis_line import CLOSED, LOST, Line, NoMasterError, Reply, Words, failure, no_answer, opened, packed
from gateway.state.redis_url import Address, Place, shown
from gateway.state.store import StoreError


class Servers(Protocol):
    """The servers as one: a call names the key that it is about."""

    name: str

    async def open(self) -> None:
        """Connect. Raises StoreError if that does not work now; it is tried again on its own all the same."""

    async def ask(self, key: bytes, words: Words, deadline: float) -> Reply:
        """As `Line.ask`."""
        ...

    def tell(self, key: bytes, words: Words) -> None:
        """As `Line.tell`."""

    def together(self, keys: Sequence[bytes]) -> Iterable[list[bytes]]:
        """The keys in groups that one call may be about."""
        ...

    async def masters(self) -> list[Line]:
        """Every server that holds a part of the keys."""
        ...

    async def close(self) -> None:
        """End all connections. Idempotent."""


def servers_at(place: Place, timeout: float) -> Servers:
    """The servers at `place`, not yet connected."""
    return Cluster(place, timeout) if place.kind == "cluster" else One(place, timeout)


class One:
    """A single server, or the master that sentinels know: whoever that is when a connection is made."""

    def __init__(self, place: Place, timeout: float) -> None:
        self.name = place.name
        self._place = place
        self._sentinels = list(place.addresses) if place.kind == "sentinel" else []
        self._share = timeout / (len(self._sentinels) + 1)  # one sentinel that hangs leaves time for the others
        self._line = Line(self._dial, place.name, timeout)

    async def _dial(self) -> AbstractConnection:
        if self._sentinels:
            return await opened(self._place.connection(await self._master()))
        return await opened(self._place.connection(*self._place.addresses))

    async def _master(self) -> Address:
        """Whom the first sentinel that answers calls the master; that one is asked first the next time."""
        why: Exception = NoMasterError()
        for address in list(self._sentinels):
            try:
                async with asyncio.timeout(self._share):
                    master = await self._master_at(address)
            except (RedisError, OSError, TimeoutError) as error:
                why = error
                continue
            if master is not None:
                self._sentinels.remove(address)
                self._sentinels.insert(0, address)
                return master
        raise why

    async def _master_at(self, address: Address) -> Address | None:
        question = (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._place.service.encode())
        sentinel = self._place.sentinel(address)
        try:
            await sentinel.connect()  # type: ignore[no-untyped-call]
            await sentinel.send_packed_command(packed(question), check_health=False)
            match await sentinel.read_response():
                case [bytes(host), bytes(port)]:
                    return host.decode(), int(port)
            return None
        finally:
            await sentinel.disconnect(nowait=True)

    async def open(self) -> None:
        await self._line.ready()

    async def ask(self, key: bytes, words: Words, deadline: float) -> Reply:
        return await self._line.ask(words, deadline)

    def tell(self, key: bytes, words: Words) -> None:
        self._line.tell(words)

    def together(self, keys: Sequence[bytes]) -> Iterable[list[bytes]]:
        return [list(keys)]

    async def masters(self) -> list[Line]:
        return [self._line]

    async def close(self) -> None:
        await self._line.close()


class Cluster:
    """The nodes of a cluster, one line each."""

    def __init__(self, place: Place, timeout: float) -> None:
        self.name = place.name
        self._place = place
        self._timeout = timeout
        self._lines: dict[Address, Line] = {}
        self._slots: list[Line | None] = []  # the line of each slot; empty until the nodes are known
        self._keeper: asyncio.Task[None] | None = None
        self._learning: asyncio.Future[None] | None = None
        self._learn_again = asyncio.Event()
        self._away: StoreError | None = None

    async def open(self) -> None:
        await self._known()
        for line in await self.masters():
            await line.ready()

    async def ask(self, key: bytes, words: Words, deadline: float) -> Reply:
        line = await self._line_of(key)
        try:
            return await line.ask(words, deadline)
        except AskError as error:  # also MovedError, which is one
            async with asyncio.timeout_at(deadline):
                return await self._ask_other(line, error, words, deadline)
        except ClusterDownError:
            self._learn_again.set()
            raise
        except StoreError:
            self._learn_again.set()
            raise

    async def _ask_other(self, line: Line, error: AskError, words: Words, deadline: float) -> Reply:
        """Ask the node that `error` names: once, since a second hint would mean that the cluster is in flux."""
        host = error.host or next(known[0] for known, other in self._lines.items() if other is line)
        other = self._line_to((host, error.port))
        if isinstance(error, MovedError):
            self._learn_again.set()
        else:
            await other.ready()
            other.tell((b"ASKING",))
        return await other.ask(words, deadline)

    def tell(self, key: bytes, words: Words) -> None:
        line = self._slots[key_slot(key)] if self._slots else None
        if line is not None:
            line.tell(words)

    def together(self, keys: Sequence[bytes]) -> Iterable[list[bytes]]:
        groups: dict[int, list[bytes]] = {}
        for key in keys:
            groups.setdefault(key_slot(key), []).append(key)
        return groups.values()

    async def masters(self) -> list[Line]:
        await self._known()
        return list({line for line in self._slots if line is not None})

    async def close(self) -> None:
        self._away = CLOSED.error(self.name)
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])
        self._end_learning()
        for line in list(self._lines.values()):
            await line.close()

    async def _line_of(self, key: bytes) -> Line:
        if not self._slots:
            await self._known()
        line = self._slots[key_slot(key)]
        if line is None:
            self._learn_again.set()
            raise StoreError(f"{self.name}: no node has the key's slot", "unreachable")
        return line

    def _line_to(self, address: Address) -> Line:
        line = self._lines.get(address)
        if line is None:

            async def dial() -> AbstractConnection:
                return await opened(self._place.connection(address))

            line = self._lines[address] = Line(dial, f"redis at {shown(address)}", self._timeout)
        return line

    async def _known(self) -> None:
        """Wait until the nodes are known. Raises StoreError if nobody tells them."""
        while not self._slots:
            if self._away is not None:
                raise StoreError(str(self._away), self._away.reason)
            if self._keeper is None:
                self._keeper = asyncio.create_task(self._keep(), name=f"nodes of {self.name}")
            if self._learning is None:
                self._learning = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._learning)

    async def _keep(self) -> None:
        """Learn the nodes, and again when something points to a change; at most once a second."""
        while True:
            self._learn_again.clear()
            try:
                async with asyncio.timeout(self._timeout):
                    await self._learn()
                self._away = None
            except StoreError as error:
                self._away = error
            except TimeoutError:
                self._away = no_answer(self._timeout).error(self.name)
            self._end_learning()
            if self._away is None and not any(line.away for line in self._lines.values()):
                await self._learn_again.wait()
            await asyncio.sleep(redis_line.RETRY)

    async def _learn(self) -> None:
        """Ask all nodes known and those of the URL at once, and believe the first that knows."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        addresses = dict.fromkeys([*self._lines, *self._place.addresses])
        questions = [asyncio.create_task(self._nodes(address, deadline)) for address in addresses]
        why: StoreError | None = None
        try:
            for question in asyncio.as_completed(questions):
                try:
                    await self._use(await question)
                    return
                except StoreError as error:
                    why = why or error
                except ResponseError as error:
                    why = why or failure(error).error(self.name)
        finally:
            for task in questions:
                task.cancel()
            await asyncio.wait(questions)
        raise why or LOST.error(self.name)

    async def _nodes(self, address: Address, deadline: float) -> list[tuple[int, int, Address]]:
        """First slot, last slot and master of each range, as the node at `address` knows them. Raises StoreError."""
        reply = await self._line_to(address).ask((b"CLUSTER", b"SLOTS"), deadline)
        ranges: list[tuple[int, int, Address]] = []
        for part in reply if isinstance(reply, list) else []:
            match part:
                case [int(first), int(last), [host, int(port), *_], *_]:
                    name = host.decode("ascii", "replace") if isinstance(host, bytes) else ""
                    ranges.append((first, last, (name or address[0], port)))
        if not ranges:
            raise StoreError(f"redis at {shown(address)}: knows no nodes of a cluster")
        return ranges

    async def _use(self, ranges: list[tuple[int, int, Address]]) -> None:
        slots: list[Line | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, address in ranges:
            line = self._line_to(address)
            slots[first : last + 1] = [line] * (last + 1 - first)
        self._slots = slots
        serving = {address for _, _, address in ranges}
        for address in [address for address in self._lines if address not in serving]:
            await self._lines.pop(address).close()

    def _end_learning(self) -> None:
        learning, self._learning = self._learning, None
        if learning is not None:
            learning.set_result(None)
