"""The children of a generation: forked, watched, replaced.

A child that dies is replaced at once if it had served for a second, else after a pause that doubles; one whose event
loop is silent for `SILENT_SECONDS` is ended and then replaced like any other.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from gateway.observe import metrics
from gateway.observe.counters import CounterMap
from gateway.observe.logs import get_logger
from gateway.service.channel import Channel, pair

log = get_logger("gateway.generation")

SILENT_SECONDS: Final = 5.0
START_SECONDS: Final = 60.0  # until the first heartbeat counts
LIVED_SECONDS: Final = 1.0
FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 10.0

Role = Literal["worker", "admin"]
State = Literal["starting", "ready", "serving", "draining"]


@dataclass(eq=False)
class Running:
    """A child that runs. `started` is in seconds since 1970, `since` of the monotonic clock."""

    role: Role
    number: int
    pid: int
    channel: Channel
    row: int
    started: float
    since: float
    state: State = "starting"
    ended_for: str = ""  # why we ended it


class Children:
    """`serve` is called in the forked process, with its end of the channel, and gives its exit status."""

    def __init__(self, map: CounterMap, serve: Callable[[Role, int, Channel, int], int]) -> None:
        self.running: list[Running] = []
        self.restarts = 0
        self._map = map
        self._serve = serve
        self._pauses: dict[tuple[Role, int], float] = {}
        self._due: dict[tuple[Role, int, int], float] = {}

    def start(self, role: Role, number: int, row: int) -> Running:
        """Fork one."""
        ours, theirs = pair()
        counters = self._map.row(row)
        counters.clear_gauges()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                ours.close()
                for other in self.running:
                    other.channel.socket.close()
                status = self._serve(role, number, Channel(theirs), row)
            finally:
                os._exit(status)  # nothing of the generation's own is to be tidied up here
        theirs.close()
        now = time.monotonic()
        counters.take(pid)
        counters.beat(int(now * 1000))
        child = Running(role, number, pid, Channel(ours), row, time.time(), now)
        self.running.append(child)
        return child

    def restart_due(self) -> list[Running]:
        """Fork those whose pause is over."""
        now = time.monotonic()
        due = [key for key, when in self._due.items() if when <= now]
        for key in due:
            del self._due[key]
        return [self.start(*key) for key in due]

    def reap(self, *, replace: bool) -> list[tuple[Running, str]]:
        """Those that ended, and how; they are replaced if `replace`, unless they were told to end."""
        ended: list[tuple[Running, str]] = []
        for child in tuple(self.running):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            self.running.remove(child)
            child.channel.close()
            self._map.row(child.row).clear_gauges()
            how = child.ended_for or how_it_died(status)
            ended.append((child, how))
            if replace:
                self._replace(child, how)
        return ended

    def _replace(self, child: Running, how: str) -> None:
        now = time.monotonic()
        key = (child.role, child.number)
        lived = child.state in ("serving", "draining") and now - child.since >= LIVED_SECONDS
        pause = 0.0 if lived else min(LONGEST_PAUSE, 2 * self._pauses.get(key, FIRST_PAUSE / 2))
        self._pauses[key] = pause
        self._due[(child.role, child.number, child.row)] = now + pause
        self.restarts += 1
        kind = "silent" if child.ended_for else "killed" if "signal" in how else "exited"
        metrics.counter("gateway_worker_restarts_total", how=kind).add()
        log.error(
            "worker_died",
            role=child.role,
            worker=child.number,
            pid=child.pid,
            how=how,
            seconds=round(now - child.since, 3),
            restart_in=round(pause, 3),
        )

    def end_silent(self) -> None:
        """Kill those whose loop does not turn any more."""
        now = time.monotonic()
        for child in self.running:
            silent = now - self._map.row(child.row).heartbeat / 1000
            allowed = SILENT_SECONDS if child.state != "starting" else START_SECONDS
            if silent > allowed and not child.ended_for:
                child.ended_for = f"its event loop was silent for {silent:.0f} seconds"
                os.kill(child.pid, signal.SIGKILL)

    def kill(self) -> None:
        """All of them, now."""
        for child in self.running:
            os.kill(child.pid, signal.SIGKILL)


def how_it_died(status: int) -> str:
    """The words for what waitpid(2) says."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = str(number)
        return f"killed by signal {name}"
    return f"exit status {os.WEXITSTATUS(status)}"
