"""What watches the processes of a service: whom it ends, whom it leaves, what it believes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import cast

import pytest

from gateway.observe.counters import ROW_OCTETS, CounterMap
from gateway.service import supervisor
from gateway.service.channel import Channel, pair
from gateway.service.children import Children, Running
from gateway.service.generations import Generation
from gateway.service.listening import StartError
from gateway.service.rows import Rows


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A child that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("stood_still", [True, False])
def test_a_silent_worker(child: subprocess.Popen[bytes], stood_still: bool) -> None:
    """Is ended, but not by a generation that stood still with it, as in a container that was paused."""
    children = Children(CounterMap.create(2), lambda *place: 0, lambda who, message: None)
    ours, theirs = pair()
    long_ago = time.monotonic() - 30
    children.running.append(Running("worker", 0, child.pid, Channel(ours), 1, long_ago, "serving"))
    children._looked = long_ago if stood_still else time.monotonic()
    children.end_silent()
    if not stood_still:
        assert child.wait() == -signal.SIGKILL
    assert bool(children.running[0].ended_for) is not stood_still
    ours.close()
    theirs.close()


@pytest.mark.parametrize("stood_still", [True, False])
def test_a_silent_generation(monkeypatch: pytest.MonkeyPatch, stood_still: bool) -> None:
    monkeypatch.setattr(supervisor, "_ended_child", lambda: 0)  # this process's children are others' here

    class Process:
        pid = 0
        returncode: int | None = None
        killed = False

        def poll(self) -> None:
            return None

        def kill(self) -> None:
            self.killed = True

    async def look(one: supervisor.Supervisor) -> None:
        await one._look_after()
        await asyncio.gather(*one._tasks)

    process, (ours, theirs) = Process(), pair()
    watching = supervisor.Supervisor([])
    long_ago = time.monotonic() - 60
    watching._map.row(1).beat(int(long_ago * 1000))
    with asyncio.Runner() as runner:
        begun: asyncio.Future[str] = runner.get_loop().create_future()
        channels = Channel(ours), Channel(theirs)
        generation = Generation(
            1, cast("subprocess.Popen[bytes]", process), *channels, begun, state="serving", rows=[1]
        )
        watching._generations.append(generation)
        watching._looked = long_ago if stood_still else time.monotonic()
        runner.run(look(watching))
    assert process.killed is not stood_still
    generation.close()


def test_a_child_that_a_thread_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the supervisor's two looks, as one does that ends an embedded server."""
    with subprocess.Popen(["true"]) as process:
        pass
    found = [process.pid, 0]
    monkeypatch.setattr(supervisor, "_ended_child", lambda: found.pop(0))
    supervisor.Supervisor([])._reap()
    assert not found


def test_the_same_rows_again() -> None:
    """Whatever was written to stays in memory, and each look at the counters reads it."""
    rows = Rows(CounterMap.create(16))
    for _ in range(10):
        first, second = rows.take(3), rows.take(3)
        assert sorted(first + second) == [1, 2, 3, 4, 5, 6]
        rows.give_back(first, 0.0)
        rows.give_back(second, 0.0)


def test_workers_whose_generation_is_gone(child: subprocess.Popen[bytes]) -> None:
    """They have until the end of the drain; one that stands still does not live for ever."""
    map = CounterMap.create(4)
    rows = Rows(map)
    map.row(taken := rows.take(1)[0]).take(child.pid)
    rows.give_back([taken], 100.0)
    rows.end_orphans(99.0)
    assert child.poll() is None and list(rows.orphans) == [child.pid]
    rows.end_orphans(100.0)
    assert os.waitpid(child.pid, 0)[1] == signal.SIGKILL  # in place of the supervisor
    rows.end_orphans()  # nobody is signaled that is no child any more
    assert not rows.orphans and rows.free == 3


def test_a_row_that_was_scribbled_on() -> None:
    """A worker's stages may write to it; the supervisor reads it, and gives it to the next one."""
    map = CounterMap.create(3)
    for filled in (b"\xff", b"\x01", b"\x00\x7f"):
        map.row(1).slot("gateway_sessions_total").add()
        cells = map.row(1)._octets
        cells[ROW_OCTETS + 24 : 2 * ROW_OCTETS] = (filled * ROW_OCTETS)[: ROW_OCTETS - 24]
        cells[ROW_OCTETS + 16 : ROW_OCTETS + 24] = (1 << 62).to_bytes(8, "little")
        fresh = CounterMap.attach(os.dup(map.fd))
        fresh.row(2).slot("gateway_sessions_total").add()
        fresh.row(1).take(0)
        assert "gateway_sessions_total" in fresh.totals()


def test_who_writes_without_end() -> None:
    """A process that does holds nobody up."""

    class Endless:
        def __init__(self) -> None:
            self.left = 1000

        def recv(self, size: int) -> bytes:
            self.left -= 1
            assert self.left, "no end of it"
            return b"\0\0\0\0"

    ours, theirs = pair()
    channel = Channel(ours)
    channel.socket = Endless()  # type: ignore[assignment]
    channel._break = lambda why: None  # type: ignore[method-assign]
    assert not channel.receive() and not channel.closed
    ours.close()
    theirs.close()


def test_a_line_is_written_at_once() -> None:
    """Workers write to the same standard error."""
    read, write = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)  # a read gives what one write wrote
    program = "from gateway.service.supervisor import _say; _say('gateway: ready')"
    subprocess.run(
        [sys.executable, "-c", program], stderr=write, env={**os.environ, "PYTHONUNBUFFERED": "1"}, check=True
    )
    assert os.read(read, 100) == b"gateway: ready\n"
    os.close(read)
    os.close(write)


@pytest.mark.anyio
async def test_the_old_generation_serves_until_the_new_one_does() -> None:
    """Not only until that was told to: the doors open a moment later. One that ends instead changes nothing."""
    service = supervisor.Supervisor([])
    ends = [pair() for _ in range(8)]
    begun: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    old, new, dead = (
        Generation(number, cast("subprocess.Popen[bytes]", None), Channel(ends[2 * number][0]),
                   Channel(ends[2 * number + 1][0]), begun, state=state)
        for number, state in enumerate(("serving", "starting", "starting"), 1)
    )  # fmt: skip
    service._generations += [old, new, dead]
    taking = asyncio.create_task(service._take_over(dead))
    await asyncio.sleep(0)
    dead.state = "ended"
    dead.close()
    with pytest.raises(StartError, match="ended as soon as it accepted"):
        await taking
    assert old.state == "serving"
    taking = asyncio.create_task(service._take_over(new))
    for _ in range(5):
        await asyncio.sleep(0)
    assert (old.state, new.state) == ("serving", "serving")
    service._heard(new, {"op": "accepts"})
    await taking
    assert (old.state, new.state) == ("draining", "serving")
    for one, other in ends:
        one.close()
        other.close()
