"""The LMDB store shared by real processes: exact counts, killed and stopped ones, places of the dead."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from gateway.state.lmdb_files import FileLock
from gateway.state.lmdb_store import LmdbStore
from gateway.state.memory import MemoryStore
from gateway.state.settings import StoreSettings
from gateway.state.store import StoreError, Window

SCRIPT = Path(__file__).with_name("store_process.py")
FOREVER = 1e9


class Process:
    """One of the processes that share the store."""

    def __init__(self, folder: Path, timeout: float) -> None:
        self.child = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        assert self.child.stdin is not None and self.child.stdout is not None
        self.input: IO[bytes] = self.child.stdin
        self.output: IO[bytes] = self.child.stdout

    def say(self, line: str) -> None:
        self.input.write(f"{line}\n".encode())
        self.input.flush()

    def answer(self) -> str:
        line = self.output.readline()
        assert line, f"it ended: {self.child.wait()}"
        return line.decode().strip()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.answer()

    def stop(self) -> None:
        self.child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.child.pid, os.WSTOPPED)

    def kill(self) -> bytes:
        """Kill it and reap it; what it had said and nobody read."""
        self.child.kill()
        rest = self.output.read()
        self.child.wait()
        return rest

    def end(self) -> None:
        self.input.close()
        assert self.child.wait() == 0


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a process that has the store open."""
    processes: list[Process] = []

    def started(timeout: float = 10.0) -> Process:
        process = Process(tmp_path / "store", timeout)
        processes.append(process)
        assert process.answer() == "open"
        return process

    yield started
    for process in processes:
        if process.child.poll() is None:
            process.kill()
        process.input.close()
        process.output.close()


async def opened(tmp_path: Path, timeout: float = 10.0) -> LmdbStore:
    store = LmdbStore(StoreSettings("lmdb", tmp_path / "store", timeout=timeout))
    await store.open()
    return store


async def counted(store: LmdbStore, key: str) -> int:
    [count] = (await store.hit(key, [Window(10**9, FOREVER)], 0)).counts
    return int(count)


def test_four_processes_hammer_one_limit(start: Start) -> None:
    processes = [start() for _ in range(4)]
    for process in processes:
        process.say("hits k 3000 2000")
    assert sum(int(process.answer()) for process in processes) == 3000
    for process in processes:
        process.say("hits open 1000000 2000")
    assert sum(int(process.answer()) for process in processes) == 8000
    assert processes[0].ask("hits open 8010 100") == "10"
    for process in processes:
        process.end()


@pytest.mark.anyio
async def test_no_counter_is_lost_by_killing(start: Start, tmp_path: Path) -> None:
    store = await opened(tmp_path)
    acknowledged, killed = 0, 0
    for round in range(6):
        pair = [start(), start()]
        for process in pair:
            process.say("count k")
        acknowledged += sum([len(process.output.read(random.Random(round).randrange(1, 2000))) for process in pair])
        acknowledged += sum([len(process.kill()) for process in pair])
        killed += 2
        assert acknowledged <= await counted(store, "k") <= acknowledged + killed  # one each was not yet said
    await store.close()


@pytest.mark.anyio
@pytest.mark.parametrize("ending", [signal.SIGCONT, signal.SIGKILL])
async def test_a_stopped_writer_blocks_nobody_for_long(start: Start, tmp_path: Path, ending: signal.Signals) -> None:
    store = await opened(tmp_path, timeout=0.1)
    stopped = start()
    assert stopped.ask("hold places 5") == "1"
    assert stopped.ask("lock") == "locked"
    stopped.stop()
    with pytest.raises(StoreError, match=r"lmdb store /.*: another process has the lock"):
        await store.hit("k", [Window(1, 1)])
    with pytest.raises(StoreError):
        await store.get("k")
    late = LmdbStore(StoreSettings("lmdb", tmp_path / "other" / ".." / "store", timeout=0.1))
    with pytest.raises(StoreError):  # nor does the next one that comes
        await late.open()
    stopped.child.send_signal(ending)
    if ending == signal.SIGKILL:
        stopped.child.wait()
    else:
        stopped.input.close()
        stopped.child.wait()
    await store.put("k", b"1", 60)
    assert await store.get("k") == b"1"
    lease = await store.hold("places", 1)
    assert lease is not None
    await store.close()


@pytest.mark.anyio
async def test_places_of_the_dead_are_free_again(start: Start, tmp_path: Path) -> None:
    store = await opened(tmp_path)
    lives, dies = start(), start()
    assert [dies.ask("hold k 3"), dies.ask("hold k 3"), lives.ask("hold k 3")] == ["1", "1", "1"]
    assert await store.hold("k", 3) is None
    dies.kill()
    assert lives.ask("hold other 1") == "1"
    for owner in list(store._owners._living):  # what was found out a moment ago is not believed any more
        del store._owners._living[owner]
    leases = [await store.hold("k", 3) for _ in range(3)]
    assert [lease is not None for lease in leases] == [True, True, False]
    lives.kill()
    await store.close()
    again = await opened(tmp_path)  # nobody lives
    assert await again.entries("") == []
    assert [path.name for path in (tmp_path / "store" / "owners").iterdir()] == [again._owners.own.hex()]
    await again.close()


@pytest.mark.anyio
async def test_all_places_of_the_dead_are_free_again_whoever_met_it_first(start: Start, tmp_path: Path) -> None:
    """The one that finds it dead where a limit is reached leaves the other keys to the replacement."""
    store = await opened(tmp_path)
    dies = start()
    assert [dies.ask("hold full 1"), dies.ask("hold other 9")] == ["1", "1"]
    dies.kill()
    lease = await store.hold("full", 1)
    assert lease is not None
    lease.release()
    start()
    assert await store.entries("") == []
    await store.close()


@pytest.mark.anyio
async def test_who_looks_through_a_large_database_does_not_keep_others_from_opening_it(tmp_path: Path) -> None:
    store = LmdbStore(StoreSettings("lmdb", tmp_path / "store", timeout=0.001))
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    lock, users = FileLock(folder / "lock"), FileLock(folder / "users")
    assert lock.take() and users.take()
    opening = asyncio.ensure_future(store.open())
    await asyncio.wait([opening], timeout=0.1)  # many times its time-out
    assert not opening.done()
    users.take(shared=True)
    lock.give()
    await opening
    lock.take()
    late = LmdbStore(StoreSettings("lmdb", folder, timeout=0.001))
    with pytest.raises(StoreError, match="another process has the lock"):
        await late.open()
    for each in (lock, users):
        each.close()
    await store.close()


def test_two_workers_allow_what_one_counter_allows(start: Start) -> None:
    """Eight clients hammer 100/minute for three minutes of a clock that the test turns."""
    clock = [1_700_000_000.0]
    memory = MemoryStore(lambda: clock[0])
    workers = [start(), start()]
    chance = random.Random(5)
    allowed = {"memory": 0, "lmdb": 0}
    while clock[0] < 1_700_000_180:
        client = chance.randrange(8)
        answer = workers[client % 2].ask(f"at {clock[0]!r} k 100 60")
        allowed["lmdb"] += int(answer)
        allowed["memory"] += memory.hit_now("k", [Window(100, 60)]).allowed
        clock[0] += chance.expovariate(20)
    assert allowed["lmdb"] == allowed["memory"]
    assert 250 < allowed["memory"] <= 400
