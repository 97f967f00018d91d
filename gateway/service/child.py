"""A process that a generation forked: a worker, or the one that answers the admin API.

It says `ready`, waits for `accept`, says `accepts`, serves, and ends when it is told to drain, or when its generation
is gone: nobody could reach it then.
"""

from __future__ import annotations

import asyncio
import base64
import signal
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping

import structlog

from gateway.observe import logs
from gateway.observe.counters import CounterRow
from gateway.observe.loop_lag import LoopLag
from gateway.service.channel import Channel, Json, Message
from gateway.service.listening import StartError

log = structlog.get_logger("gateway.worker")


class Child(ABC):
    """What both have in common: the channel to the generation, the heartbeat, the order of events."""

    def __init__(self, channel: Channel, row: CounterRow, drain: float) -> None:
        self.channel = channel
        self.grace = drain
        self._row = row
        self.last = False  # no other generation takes our place
        self._accept = asyncio.Event()
        self._end = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def prepare(self) -> None:
        """Everything that can fail. Raises StartError."""

    @abstractmethod
    async def accept(self) -> None:
        """Open the doors."""

    @abstractmethod
    async def close(self) -> None:
        """Serve to the end what is open, at most `grace` seconds."""

    def hurry(self) -> None:
        """While it closes: do not wait any longer."""
        return

    @abstractmethod
    def heard(self, message: Message) -> None:
        """A message of its own kind."""

    async def run(self) -> int:
        """From the fork to the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end.set)
        self.channel.attach(loop, self._heard, self._end.set)
        self._lag = LoopLag(self._row)
        self._lag.start()
        try:
            if await self._before(self._end, self.prepare()):
                self.channel.send({"op": "ready"})
                if await self._before(self._end, self._accept.wait()):
                    await self.accept()
                    self.channel.send({"op": "accepts"})
                    await self._end.wait()
        except StartError as error:
            self.channel.send({"op": "failed", "error": str(error)})
            await self.close_quickly()
            return 1
        await self.close()
        self._lag.stop()
        return 0

    async def _before(self, end: asyncio.Event, coroutine: Coroutine[object, object, object]) -> bool:
        """Whether it is done before the end comes; else it is canceled. Raises what it raises."""
        doing, ending = asyncio.create_task(coroutine), asyncio.create_task(end.wait())
        await asyncio.wait([doing, ending], return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if doing.done():
            doing.result()
            return True
        doing.cancel()
        await asyncio.wait([doing])
        return False

    async def close_quickly(self) -> None:
        """After a failed start."""
        self.grace = 0.0
        await self.close()

    def answer(self, number: Json, question: Awaitable[Json]) -> None:
        """Send what comes of it; it must say its own errors."""

        async def answered() -> None:
            self.channel.send({"op": "answer", "id": number, "answer": await question})

        task = asyncio.get_running_loop().create_task(answered())
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal_error", error=f"{type(error).__name__}: {error}", exc_info=error)

    def _heard(self, message: Message) -> None:
        match message["op"]:
            case "accept":
                self._accept.set()
            case "drain":
                self.grace = min(self.grace, float(str(message["seconds"])))
                self.last = self.last or bool(message["last"])
                self._end.set()
                if not self.grace:
                    self.hurry()
            case "reopen":
                reopen_logs()
            case _:
                self.heard(message)


def reopen_logs() -> None:
    """Open the log files again; what fails is logged where it still can be."""
    try:
        logs.reopen()
    except OSError as error:
        log.warning("warning", text=f"log file {error.filename}: {error.strerror}; the old one is kept")


def files_of(message: Mapping[str, Json]) -> dict[str, bytes]:
    """The files of a `files` message, as `files_message` packs them."""
    found = message["files"]
    assert isinstance(found, Mapping)
    return {path: base64.b64decode(str(text)) for path, text in found.items()}


def files_message(files: Mapping[str, bytes]) -> Message:
    """Files as a message."""
    return {"op": "files", "files": {path: base64.b64encode(data).decode() for path, data in files.items()}}


LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def loop_factory(name: str) -> LoopFactory:
    """The event loop of that name: asyncio, uvloop, or auto for uvloop where it is installed. Raises StartError."""
    if name == "asyncio":
        return asyncio.new_event_loop
    try:
        import uvloop
    except ImportError:
        if name == "uvloop":
            raise StartError("uvloop is not installed") from None
        return asyncio.new_event_loop
    return uvloop.new_event_loop
