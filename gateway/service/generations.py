"""A generation as its supervisor sees it: a process, the channel to it, and what it has been given."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from gateway.service import systemd
from gateway.service.channel import Channel, Json, Message, pair, send_sockets
from gateway.service.holdings import NOTHING, Handed, Wish
from gateway.service.listening import StartError

KILL_AFTER: Final = 20.0
"""Seconds beyond its time to end, after which a generation is killed."""

State = Literal["starting", "serving", "draining", "failed", "ended"]
ALIVE: Final = ("starting", "serving", "draining")


@dataclass(eq=False)
class Generation:
    """`begun` is "" once it is ready, else what is wrong; `accepts` is set when all its doors are open, or it ended.

    `rows` of the counters are its own and its children's.
    """

    number: int
    process: subprocess.Popen[bytes]
    channel: Channel
    over: Channel
    begun: asyncio.Future[str]
    accepts: asyncio.Event = field(default_factory=asyncio.Event)
    started: float = field(default_factory=time.time)
    state: State = "starting"
    asked: bool = False
    wish: Wish = NOTHING
    rows: list[int] = field(default_factory=list)
    workers: int = 0
    error: str = ""
    kill_at: float | None = None  # of the monotonic clock

    @property
    def alive(self) -> bool:
        """Whether it may still serve."""
        return self.state in ALIVE

    def settle(self, text: str) -> None:
        """It is ready, or it is known why not; the first word counts."""
        if not self.begun.done():
            self.begun.set_result(text)

    def accept(self) -> None:
        """Open the doors."""
        self.state = "serving"
        self.channel.send({"op": "accept"})

    def drain(self, seconds: float, *, last: bool = False) -> None:
        """End the sessions; after so many seconds all are closed. `last`: no other generation takes its place."""
        if self.state != "starting":
            self.state = "draining"
        self.kill_after(seconds + KILL_AFTER)
        self.channel.send({"op": "drain", "seconds": seconds, "last": last})

    def fail(self, text: str) -> None:
        """It is not to serve at all."""
        self.error = text
        self.state = "failed"
        self.kill_after(KILL_AFTER)
        self.channel.send({"op": "drain", "seconds": 0.0, "last": False})
        if self.process.poll() is None:
            self.process.terminate()

    def kill_after(self, seconds: float) -> None:
        """It has so long to end."""
        until = time.monotonic() + seconds
        self.kill_at = until if self.kill_at is None else min(self.kill_at, until)

    def hand(self, handed: Handed) -> None:
        """What it asked for. Raises OSError."""
        self.rows = handed.rows
        self.channel.send(handed.message)
        send_sockets(self.over.socket, handed.sockets)
        self.over.close()

    def close(self) -> None:
        """The process has ended."""
        self.accepts.set()
        self.channel.close()
        self.over.close()

    def describe(self) -> Message:
        """For the admin API."""
        return {
            "generation": self.number,
            "pid": self.process.pid,
            "started": self.started,
            "state": self.state,
            "workers": self.workers,
            "error": self.error,
        }


def launch(number: int, orders: Mapping[str, Json], counters: int) -> Generation:
    """Start the process. Raises StartError.

    Its standard input is the channel, over which it gets its orders: the list of processes shows a plain command.
    `counters` is the descriptor of their map. A session of its own keeps a terminal's Ctrl-C from it.
    """
    with contextlib.ExitStack() as stack:
        try:
            ours, theirs, over, fetched = (stack.enter_context(sock) for sock in (*pair(), *pair()))
            process = subprocess.Popen(  # it waits for the exec only
                [sys.executable, "-P", "-m", "gateway.service.generation"],
                stdin=theirs.fileno(),
                pass_fds=(fetched.fileno(), counters),
                env=systemd.child_environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise StartError(f"cannot start a process: {error.strerror or error}") from None
        stack.pop_all()
    theirs.close()
    channel = Channel(ours)
    channel.send({"op": "orders", **orders, "generation": number, "sockets": fetched.fileno(), "counters": counters})
    fetched.close()
    return Generation(number, process, channel, Channel(over), asyncio.get_running_loop().create_future())
