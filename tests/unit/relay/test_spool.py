"""Spool: every reader gets every octet once and in order, whoever waits; nothing is kept, charged or open in vain."""

from __future__ import annotations

import asyncio
import errno
import gc
import io
import os
import random
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from gateway.relay import spool as module
from gateway.relay.spool import HIGH, Spool, SpoolFull, SpoolReader, SpoolSpace

KIB = 1024
BLOCK = random.Random(3).randbytes(256 * KIB)
REAL_PWRITE = os.pwrite


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def descriptors(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test may leave a file open (loops have their own; they are the async tests' business)."""
    before = open_files()
    yield
    if "anyio_backend" not in request.fixturenames:
        assert open_files() == before


def resident(spool: Spool) -> int:
    """Octets in memory."""
    return sum(map(len, spool._blocks))


def rest(reader: SpoolReader, limit: int = 1 << 18) -> bytes:
    """Everything that can be read now."""
    parts = []
    while data := reader.read_now(limit):
        parts.append(data)
    return b"".join(parts)


class Disk:
    """Stands in for os.pwrite: counts, writes `room` octets more and then fails, at most `piece` at a time."""

    def __init__(self) -> None:
        self.calls = 0
        self.room = 1 << 60
        self.piece = 1 << 60
        self.error = errno.ENOSPC

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.calls += 1
        length = min(len(data), self.room, self.piece)
        if not length:
            raise OSError(self.error, os.strerror(self.error))
        self.room -= length
        return REAL_PWRITE(descriptor, data[:length], offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(os, "pwrite", disk.pwrite)
    return disk


# -- against a model


class Against(RuleBasedStateMachine):
    """Any order of calls, compared with plain bytes and offsets. The sizes are small so that all limits are met."""

    readers = Bundle("readers")

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.disk = Disk()
        self.patch.setattr(os, "pwrite", self.disk.pwrite)
        self.patch.setattr(module, "GATHER", 16)
        self.patch.setattr(module, "SMALL", 4)
        self.space = SpoolSpace(memory=24, total=400)
        self.spool = Spool(self.space)
        self.random = random.Random(5)
        self.data = b""
        self.kept = 0
        self.open: dict[SpoolReader, list[int]] = {}  # offset, waiting
        self.failed: BaseException | None = None
        self.ended = self.closed = False

    def teardown(self) -> None:
        self.spool.close()
        self.spool.close()
        assert self.space.used == 0
        for reader in self.open:
            assert reader.available()
            with pytest.raises(ValueError):
                reader.read_now()
        self.patch.undo()

    def moved(self) -> None:
        self.kept = min([offset for offset, _ in self.open.values()], default=len(self.data))

    @precondition(lambda self: not self.ended)
    @rule(size=st.one_of(st.integers(0, 5), st.integers(0, 60)), room=st.sampled_from([1 << 60, 1 << 60, 0, 7]))
    def write(self, size: int, room: int) -> None:
        block = self.random.randbytes(size)
        self.disk.room, self.disk.piece = room, self.random.choice([3, 1 << 60])
        used, in_file = self.space.used, self.spool.in_file
        try:
            self.spool.write(block)
        except SpoolFull:
            assert any(waiting for _, waiting in self.open.values())
            assert room < 8 or used + resident(self.spool) + size > 400
            assert (self.space.used, self.spool.in_file) == (used, in_file)
        else:
            if not self.failed:
                self.data += block
            if not any(waiting for _, waiting in self.open.values()):
                assert self.space.used == used
        self.moved()

    @rule(target=readers, place=st.floats(0, 1), waiting=st.booleans())
    def register(self, place: float, waiting: bool) -> SpoolReader:
        offset = self.kept + round(place * (len(self.data) - self.kept))
        if self.kept and not self.failed:
            with pytest.raises(ValueError):
                self.spool.reader(self.kept - 1)
        reader = self.spool.reader(offset, waiting=waiting)
        self.open[reader] = [offset, waiting]
        self.moved()
        return reader

    @rule(reader=readers, limit=st.one_of(st.integers(1, 9), st.integers(1, 99)))
    def read(self, reader: SpoolReader, limit: int) -> None:
        if self.failed:
            with pytest.raises(ConnectionError) as caught:
                reader.read_now(limit)
            assert caught.value is self.failed
            return
        at, _ = self.open[reader]
        assert reader.available() == (at < len(self.data) or self.ended)
        data = reader.read_now(limit)
        if at == len(self.data):
            assert data == (b"" if self.ended else None)
        else:
            assert data is not None and 0 < len(data) <= limit
            assert data == self.data[at : at + len(data)]
        self.open[reader] = [at + len(data or b""), False]
        assert reader.offset == self.open[reader][0]
        self.moved()

    @rule(reader=readers)
    def start(self, reader: SpoolReader) -> None:
        reader.start()
        self.open[reader][1] = False

    @rule(reader=consumes(readers))
    def close_reader(self, reader: SpoolReader) -> None:
        reader.close()
        reader.close()
        del self.open[reader]
        with pytest.raises(ValueError):
            reader.read_now()
        self.moved()

    @precondition(lambda self: len(self.data) > 150)
    @rule()
    def end(self) -> None:
        self.spool.end()
        self.ended = True
        with pytest.raises(ValueError):
            self.spool.write(b"x")

    @precondition(lambda self: self.ended and self.kept == 0 and not self.failed)
    @rule()
    def file(self) -> None:
        with self.spool.file() as file:
            assert file.read() == self.data

    @precondition(lambda self: len(self.data) > 250)
    @rule()
    def fail(self) -> None:
        self.failed = self.failed or ConnectionError("the client left")
        self.spool.fail(self.failed)
        self.spool.fail(KeyError("a second failure"))

    @invariant()
    def agrees(self) -> None:
        assert self.spool.size == len(self.data)
        assert self.spool.ended == self.ended
        assert 0 <= self.space.used <= 400
        assert self.spool.in_file == (self.space.used > 0)
        waits = any(waiting for _, waiting in self.open.values())
        behind = len(self.data) - self.kept
        fits = self.failed is not None or waits or behind <= HIGH
        assert self.spool._fits(HIGH) == fits
        assert self.spool._fits(10) == (self.failed is not None or waits or behind <= 10)
        if not self.open:
            assert resident(self.spool) == 0


Against.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
TestAgainstModel = Against.TestCase


# -- memory and file


def test_live_blocks_are_the_same_objects_and_are_dropped() -> None:
    space = SpoolSpace(memory=0)
    spool = Spool(space)
    first, second = spool.reader(), spool.reader()
    blocks = [bytes(BLOCK[:size]) for size in (1, 5000, 262144, 1024, 999)]
    for block in blocks:
        spool.write(block)
        assert first.read_now() is block
        assert resident(spool) == len(block)
        assert second.read_now() is block
        assert resident(spool) == 0
    for block in blocks[1:]:
        spool.write(block)
    assert [first.read_now() for _ in blocks[1:]] == blocks[1:]
    for number in range(1, len(blocks)):
        assert resident(spool) == sum(map(len, blocks[number:]))
        assert second.read_now() is blocks[number]
    assert resident(spool) == 0
    assert not spool.in_file
    spool.close()


def test_a_slow_live_reader_causes_no_file() -> None:
    spool = Spool(SpoolSpace(memory=0, total=0))
    reader = spool.reader()
    for _ in range(40):
        spool.write(BLOCK)
    assert not spool.in_file
    assert rest(reader) == BLOCK * 40
    spool.close()


def test_without_readers_nothing_is_kept() -> None:
    spool = Spool(SpoolSpace(memory=0, total=0))
    spool.write(BLOCK)
    assert (spool.size, resident(spool), spool.in_file) == (len(BLOCK), 0, False)
    with pytest.raises(ValueError):
        spool.reader(0)
    with pytest.raises(ValueError):
        spool.reader(len(BLOCK) + 1)
    assert spool.reader(len(BLOCK)).read_now() is None
    spool.close()


@pytest.mark.parametrize(
    ("memory", "sizes", "in_file"),
    [
        (100, [100], False),
        (100, [101], True),
        (100, [60, 40], False),
        (100, [60, 41], True),
        (100, [1] * 100, False),
        (100, [1] * 101, True),
        (0, [1], True),
        (256 * KIB, [256 * KIB], False),
        (256 * KIB, [256 * KIB, 1], True),
    ],
)
@pytest.mark.parametrize("live", [False, True], ids=["waiting", "waiting-and-live"])
def test_what_waits_moves_to_a_file_above_memory(memory: int, sizes: list[int], in_file: bool, live: bool) -> None:
    space = SpoolSpace(memory=memory)
    spool = Spool(space)
    waiting = spool.reader(waiting=True)
    near = spool.reader() if live else None
    content = b""
    for size in sizes:
        spool.write(BLOCK[:size])
        content += BLOCK[:size]
        if near is not None:
            assert near.read_now() == BLOCK[:size]
    assert spool.in_file == in_file
    assert space.used == (len(content) if in_file else 0)
    assert resident(spool) == (0 if in_file else len(content))
    waiting.start()
    assert rest(waiting, 77) == content
    spool.close()
    assert space.used == 0


def test_live_readers_close_behind_need_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(SpoolSpace())
    waiting, near = spool.reader(waiting=True), spool.reader()
    with monkeypatch.context() as patch:
        patch.delattr(os, "pread")
        for number in range(20):
            block = bytes([number]) * len(BLOCK)
            spool.write(block)
            assert near.read_now() is block
    # One that is far behind reads the file, and memory stays bounded.
    far = spool.reader(0)
    for _ in range(20):
        spool.write(BLOCK)
        assert resident(spool) <= 2 * len(BLOCK)
    content = b"".join(bytes([number]) * len(BLOCK) for number in range(20)) + BLOCK * 20
    assert rest(far) == rest(waiting) == content
    assert rest(near) == BLOCK * 20
    spool.close()


def test_the_file_goes_on_where_a_later_waiting_reader_begins() -> None:
    space = SpoolSpace(memory=KIB)
    spool = Spool(space)
    first = spool.reader(waiting=True)
    spool.write(BLOCK)
    assert rest(first) == BLOCK  # live from now on
    spool.write(b"x" * 90000)
    assert rest(first) == b"x" * 90000
    assert space.used == len(BLOCK)
    second = spool.reader(spool.size, waiting=True)
    spool.write(BLOCK)
    assert space.used == 2 * len(BLOCK)  # what only the live one read was never written
    assert rest(first) == rest(second) == BLOCK
    spool.close()
    assert space.used == 0


@pytest.mark.slow
@pytest.mark.parametrize("waiting", [True, False])
def test_a_million_blocks_of_one_octet(disk: Disk, waiting: bool) -> None:
    space = SpoolSpace()
    spool = Spool(space)
    reader = spool.reader(waiting=waiting)
    for number in range(1_000_000):
        spool.write(b"x" if number % 7 else b"y")
    assert disk.calls <= 1_000_000 // 65536 + 1
    assert len(spool._blocks) <= 1_000_000 // 65536 + 1
    if waiting:
        assert resident(spool) <= 65536
    assert rest(reader) == (b"yxxxxxx" * 142858)[:1_000_000]
    spool.close()


@pytest.mark.parametrize("tmpfile", [True, False], ids=["O_TMPFILE", "mkstemp"])
def test_the_file_has_no_name_and_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmpfile: bool) -> None:
    if not tmpfile:
        monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
    spool = Spool(SpoolSpace(tmp_path, memory=0))
    spool.reader(waiting=True)
    spool.write(BLOCK)
    assert spool._file is not None
    status = os.fstat(spool._file.fileno())
    assert (status.st_nlink, stat.S_IMODE(status.st_mode), status.st_size) == (0, 0o600, len(BLOCK))
    assert status.st_dev == tmp_path.stat().st_dev
    assert not list(tmp_path.iterdir())
    assert not os.get_inheritable(spool._file.fileno())
    spool.close()


# -- no room


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("room", [0, 5, 300 * KIB, 600 * KIB], ids=["at-once", "in-part", "later", "last"])
def test_disk_full(disk: Disk, error: int, room: int) -> None:
    space = SpoolSpace(memory=KIB)
    spool = Spool(space)
    waiting, live = spool.reader(waiting=True), spool.reader()
    disk.room, disk.error = room, error
    taken = b""
    with pytest.raises(SpoolFull) as caught:
        for size in (KIB, 255 * KIB, 3, 256 * KIB, 256 * KIB):
            spool.write(BLOCK[:size])
            taken += BLOCK[:size]
    assert os.strerror(error) in caught.value.why == str(caught.value)
    assert spool.size == len(taken)
    assert space.used <= min(room, len(taken))
    assert rest(live) == taken
    disk.room = 1 << 60
    spool.write(BLOCK)  # there is room again
    spool.end()
    assert rest(waiting) == taken + BLOCK
    spool.close()
    assert space.used == 0


def test_no_directory(tmp_path: Path) -> None:
    space = SpoolSpace(tmp_path / "none", memory=0)
    spool = Spool(space)
    waiting = spool.reader(waiting=True)
    for _ in range(2):
        with pytest.raises(SpoolFull, match="No such file"):
            spool.write(b"x")
    assert (space.used, spool.size, spool.in_file, waiting.read_now()) == (0, 0, False, None)
    spool.close()


def test_the_total_of_all_messages() -> None:
    space = SpoolSpace(memory=0, total=1000 * KIB)
    one, two = Spool(space), Spool(space)
    readers = [spool.reader(waiting=True) for spool in (one, two)]
    one.write(BLOCK)
    two.write(BLOCK)
    one.write(BLOCK)
    assert space.used == 768 * KIB
    with pytest.raises(SpoolFull, match="1024000"):
        two.write(BLOCK)
    assert (space.used, two.size) == (768 * KIB, len(BLOCK))
    one.close()
    assert space.used == len(BLOCK)
    two.write(BLOCK)
    assert rest(readers[1]) == BLOCK * 2
    two.close()
    two.close()
    assert space.used == 0


# -- waiting, on both loops


async def blocked(task: asyncio.Task[object]) -> bool:
    """Whether `task` has run as far as it can and waits."""
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


@pytest.mark.anyio
async def test_readers_wake_when_data_comes_and_at_the_end() -> None:
    spool = Spool(SpoolSpace())

    async def everything(reader: SpoolReader, limit: int) -> bytes:
        parts = []
        while data := await reader.read(limit):
            parts.append(data)
        assert await reader.read() == b""
        return b"".join(parts)

    tasks = [asyncio.create_task(everything(spool.reader(), limit)) for limit in (1, 1000, 1 << 18)]
    tasks.append(asyncio.create_task(everything(late := spool.reader(waiting=True), 1 << 18)))
    late.start()
    for size in (1, 3, 2000, 1):
        assert all([await blocked(task) for task in tasks])
        spool.write(BLOCK[:size])
    assert all([await blocked(task) for task in tasks])
    spool.end()
    assert await asyncio.gather(*tasks) == [BLOCK[:1] + BLOCK[:3] + BLOCK[:2000] + BLOCK[:1]] * 4
    assert resident(spool) == 0
    spool.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("stop", "error"),
    [
        (lambda spool, reader: spool.fail(ConnectionResetError()), ConnectionResetError),
        (lambda spool, reader: spool.close(), ValueError),
        (lambda spool, reader: reader.close(), ValueError),
    ],
    ids=["fail", "close", "reader-close"],
)
@pytest.mark.parametrize("unread", [False, True])
async def test_reads_raise_when_it_is_over(
    stop: Callable[[Spool, SpoolReader], None], error: type[Exception], unread: bool
) -> None:
    spool = Spool(SpoolSpace())
    reader = spool.reader()
    task: asyncio.Task[object] = asyncio.create_task(reader.read())
    assert await blocked(task)
    if unread:
        spool.write(b"x")
    stop(spool, reader)
    with pytest.raises(error):
        await task
    assert reader.available()
    with pytest.raises(error):
        await reader.read()
    spool.close()


@pytest.mark.anyio
async def test_the_writer_may_go_on_after_a_failure() -> None:
    """A refused message is read to its end (no octet of it may become a command), but not kept."""
    spool = Spool(SpoolSpace())
    early = spool.reader()
    spool.write(BLOCK)
    spool.fail(error := ConnectionError())
    for _ in range(10):
        spool.write(BLOCK)
        await spool.room()
    spool.end()
    assert resident(spool) == 0
    with pytest.raises(ConnectionError):
        spool.file()
    for reader in (early, spool.reader(0)):
        with pytest.raises(ConnectionError) as caught:
            await reader.read()
        assert caught.value is error
    spool.close()


@pytest.mark.anyio
@pytest.mark.parametrize("in_file", [False, True])
async def test_a_cancelled_read_has_read_nothing(in_file: bool) -> None:
    spool = Spool(SpoolSpace(memory=0))
    reader = spool.reader(waiting=in_file)
    if in_file:
        spool.write(BLOCK)
    task = asyncio.create_task(reader.read())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reader.offset == 0
    spool.write(b"more")
    # Cancelled when the data had come already but the read had not run.
    late = spool.reader(spool.size)
    task = asyncio.create_task(late.read())
    await asyncio.sleep(0)
    spool.write(b"!")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await late.read() == b"!"
    assert rest(reader) == (BLOCK if in_file else b"") + b"more!"
    spool.close()


@pytest.mark.anyio
async def test_one_coroutine_a_reader() -> None:
    spool = Spool(SpoolSpace())
    reader = spool.reader()
    task = asyncio.create_task(reader.read())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError):
        await reader.read()
    spool.write(b"x")
    assert await task == b"x"
    spool.close()


@pytest.mark.anyio
async def test_a_copy_out_of_the_file_lets_others_run() -> None:
    spool = Spool(SpoolSpace(memory=0))
    reader = spool.reader(waiting=True)
    for _ in range(20):
        spool.write(BLOCK)
    spool.end()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    while await reader.read():
        pass
    task.cancel()
    assert turns >= 19
    spool.close()


@pytest.mark.anyio
async def test_room_waits_for_the_slowest_live_reader() -> None:
    spool = Spool(SpoolSpace())
    await spool.room()
    slow, fast = spool.reader(), spool.reader()
    for _ in range(2):
        spool.write(BLOCK)
        await spool.room()
    spool.write(b"x")
    rest(fast)
    task: asyncio.Task[object] = asyncio.create_task(spool.room())
    assert await blocked(task)
    assert slow.read_now(len(BLOCK))
    assert await blocked(task)  # one octet above half
    assert slow.read_now(1)
    await task
    spool.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "stop",
    [
        lambda spool, reader: reader.close(),
        lambda spool, reader: spool.fail(ConnectionError()),
        lambda spool, reader: spool.close(),
        lambda spool, reader: spool.reader(spool.size, waiting=True),
    ],
    ids=["reader-close", "fail", "close", "waiting-reader"],
)
async def test_room_ends_with_its_cause(stop: Callable[[Spool, SpoolReader], object]) -> None:
    spool = Spool(SpoolSpace())
    reader = spool.reader()
    for _ in range(3):
        spool.write(BLOCK)
    task: asyncio.Task[object] = asyncio.create_task(spool.room())
    assert await blocked(task)
    stop(spool, reader)
    await task
    spool.close()


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["start", "read"])
async def test_room_waits_once_a_waiting_reader_started(how: str) -> None:
    spool = Spool(SpoolSpace())
    spool.reader()  # a live one that reads nothing holds nobody up while everything is kept anyway
    reader = spool.reader(waiting=True)
    for _ in range(5):
        spool.write(BLOCK)
        await spool.room()
    if how == "start":
        reader.start()
    else:
        await reader.read()
    task: asyncio.Task[object] = asyncio.create_task(spool.room())
    assert await blocked(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    task = asyncio.create_task(spool.room())
    assert await blocked(task)
    spool.close()
    await task


# -- as a file


@pytest.fixture(params=[0, 150 * KIB, 1 << 20], ids=["file", "both", "memory"])
def whole(request: pytest.FixtureRequest) -> Iterator[tuple[Spool, bytes]]:
    """An ended spool of 300 KiB that keeps everything, and its content."""
    spool = Spool(SpoolSpace(memory=request.param))
    spool.reader(waiting=True)
    for size in (100 * KIB, 3, 5, 100 * KIB - 8, 60 * KIB, 40 * KIB):
        spool.write(BLOCK[:size])
    spool.end()
    content = b"".join(BLOCK[:size] for size in (100 * KIB, 3, 5, 100 * KIB - 8, 60 * KIB, 40 * KIB))
    assert spool.in_file == (request.param < 1 << 20)
    yield spool, content
    spool.close()


@pytest.mark.parametrize("buffered", [True, False])
def test_file_does_what_a_file_does(whole: tuple[Spool, bytes], buffered: bool) -> None:
    spool, content = whole
    file = spool.file()
    ours = file if buffered else cast(io.BufferedReader, file.raw)
    model = io.BytesIO(content)
    assert ours.readable() and ours.seekable() and not ours.writable()
    choice = random.Random(7)
    for _ in range(300):
        whence = choice.choice([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
        place = choice.randrange(len(content) + 10)
        offset = {io.SEEK_SET: place, io.SEEK_CUR: place - model.tell(), io.SEEK_END: place - len(content)}[whence]
        assert ours.seek(offset, whence) == model.seek(offset, whence) == ours.tell()
        size = choice.choice([0, 1, 100, 70000])
        data = ours.read(size)
        assert data is not None
        wanted = model.read(size)
        assert data == (wanted if buffered else wanted[: len(data)])
        assert bool(data) == bool(wanted)
        model.seek(ours.tell())
    ours.seek(0)
    assert ours.readlines() == io.BytesIO(content).readlines()
    for offset, whence in ((-1, io.SEEK_SET), (0, 9)):
        with pytest.raises(ValueError):
            file.raw.seek(offset, whence)
    with pytest.raises(io.UnsupportedOperation):
        file.write(b"x")
    file.close()
    file.close()
    with pytest.raises(ValueError):
        file.read(1)


def test_file_keeps_the_message_until_it_is_closed() -> None:
    spool = Spool(SpoolSpace())
    reader = spool.reader()
    spool.write(b"Subject: x\r\n")
    with pytest.raises(ValueError, match="ended"):
        spool.file()
    spool.end()
    file = spool.file()
    assert rest(reader) == b"Subject: x\r\n"
    reader.close()
    assert file.read() == b"Subject: x\r\n"
    assert spool.reader(0).read_now() == b"Subject: x\r\n"
    file.close()
    with pytest.raises(ValueError, match="not kept"):
        spool.file()
    spool.close()


def test_file_of_a_closed_spool_raises(whole: tuple[Spool, bytes]) -> None:
    spool, _ = whole
    file = spool.file()
    assert file.raw.read(1) == BLOCK[:1]
    spool.close()
    with pytest.raises(ValueError, match="spool"):
        file.raw.read(1)
    file.close()


def test_file_of_nothing() -> None:
    spool = Spool(SpoolSpace())
    spool.end()
    with spool.file() as file:
        assert file.read() == b""
    spool.close()
