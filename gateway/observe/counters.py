"""The counters of a service: one block of memory that all its processes share, in which nothing is lost or locked.

The block is a row for each process, and a row has one writer at a time. It holds numbers, one a series, and the text
of each series as Prometheus writes it (`gateway_sessions_total{pipeline="mx"}`), put down by the writer the first time
that the series occurs. So no reader needs to know in advance what is counted, and who takes the row over from a
process that died, however it died, goes on with its numbers: counters never fall while the supervisor lives.

A number is 8 octets at an aligned place, stored at once, so that a reader sees the old one or the new one. A series
is there once the row's `number` says so, which is written after its text.

    row: | owner | heartbeat | number | ... | a number for each series | length, kind, text of each series |
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import Final, Literal

Kind = Literal["c", "g", "m"]
"""A counter; a gauge, of which all rows together are the sum; or one of which the highest counts."""

ROW_OCTETS: Final = 2 << 20  # sparse: memory is used for what is written only
SERIES: Final = 16384
LOST: Final = "gateway_metrics_lost_total"
"""The series that takes what is counted when a row is full."""

_HEADER: Final = 8  # numbers of 8 octets
_OWNER, _HEARTBEAT, _NUMBER = range(3)
_CELLS: Final = ROW_OCTETS // 8
_NAMES: Final = (_HEADER + SERIES) * 8
_ENTRY: Final = struct.Struct("<Hc")  # octets of the text, kind


class Count:
    """One number of a row: `add` to a counter or gauge, `set` a gauge. Whole numbers, which may be below 0."""

    __slots__ = ("_cells", "_place")

    def __init__(self, cells: memoryview[int], place: int) -> None:
        self._cells = cells
        self._place = place

    def add(self, n: int = 1) -> None:
        """Count `n` more."""
        self._cells[self._place] += n

    def set(self, n: int) -> None:
        """The number is `n` now."""
        self._cells[self._place] = n

    @property
    def value(self) -> int:
        """The number as it is."""
        return self._cells[self._place]

    @property
    def cell(self) -> tuple[memoryview[int], int]:
        """The numbers that it is among, and where."""
        return self._cells, self._place


class CounterRow:
    """The numbers of one process. Only their owner writes, or who comes after it."""

    def __init__(self, octets: memoryview, cells: memoryview[int], index: int) -> None:
        self.index = index
        self._octets = octets
        self._cells = cells
        self._base = index * _CELLS
        self._text_end = index * ROW_OCTETS + _NAMES
        self._counts: dict[str, Count] = {}
        self._series: list[tuple[str, Kind]] = []

    # -- who it belongs to

    @property
    def owner(self) -> int:
        """Process id of the writer, 0 while there is none."""
        return self._cells[self._base + _OWNER]

    @property
    def heartbeat(self) -> int:
        """When the owner last was alive: milliseconds of CLOCK_MONOTONIC, 0 before its first beat."""
        return self._cells[self._base + _HEARTBEAT]

    def take(self, pid: int) -> None:
        """The row is this process's from now on; counters go on, gauges begin at 0. With 0 it is nobody's."""
        self.clear_gauges()
        self._cells[self._base + _HEARTBEAT] = 0
        self._cells[self._base + _OWNER] = pid

    def beat(self, ms: int) -> None:
        """The owner is alive."""
        self._cells[self._base + _HEARTBEAT] = ms

    def clear_gauges(self) -> None:
        """What the row's owner had open is gone with it."""
        for place, (_, kind) in enumerate(self.series(), self._base + _HEADER):
            if kind != "c":
                self._cells[place] = 0

    # -- its numbers

    @property
    def number(self) -> int:
        """How many series it has."""
        return self._cells[self._base + _NUMBER]

    def slot(self, sample: str, kind: Kind = "c") -> Count:
        """The number of a series, which is made if it is new.

        In a full row a counter is the one that is shared by what is lost, a gauge one that nobody sees.
        """
        self.series()
        count = self._counts.get(sample)
        if count is not None:
            return count
        if not self._series:
            self._append(LOST, "c")
        if self._append(sample, kind):
            return self._counts[sample]
        return self._counts[LOST] if kind == "c" else Count(memoryview(bytearray(8)).cast("q"), 0)

    def find(self, sample: str) -> Count | None:
        """The number of a series if it is there."""
        self.series()
        return self._counts.get(sample)

    def series(self) -> list[tuple[str, Kind]]:
        """All series in the order of their numbers."""
        while len(self._series) < min(self.number, SERIES):
            if self._text_end + _ENTRY.size > (self.index + 1) * ROW_OCTETS:
                break  # its owner has written over it
            size, kind = _ENTRY.unpack_from(self._octets, self._text_end)
            start = self._text_end + _ENTRY.size
            text = str(self._octets[start : start + size], "utf-8", "replace")
            self._learn(text, "c" if kind == b"c" else "m" if kind == b"m" else "g", start + size)
        return self._series

    def _append(self, sample: str, kind: Kind) -> bool:
        """Text first, then the number that makes it known; False where there is no room."""
        text = sample.encode()
        start = self._text_end + _ENTRY.size
        if len(self._series) >= SERIES or start + len(text) > (self.index + 1) * ROW_OCTETS or len(text) > 0xFFFF:
            return False
        _ENTRY.pack_into(self._octets, self._text_end, len(text), kind.encode())
        self._octets[start : start + len(text)] = text
        self._learn(sample, kind, start + len(text))
        self._cells[self._base + _NUMBER] = len(self._series)
        return True

    def _learn(self, sample: str, kind: Kind, end: int) -> None:
        self._counts[sample] = Count(self._cells, self._base + _HEADER + len(self._series))
        self._series.append((sample, kind))
        self._text_end = end

    def values(self) -> list[int]:
        """The numbers of `series()`, as they are now."""
        start = self._base + _HEADER
        return self._cells[start : start + len(self.series())].tolist()


class CounterMap:
    """All rows. The supervisor creates it; processes that it starts attach by the descriptor."""

    def __init__(self, memory: mmap.mmap, fd: int) -> None:
        self.fd = fd
        octets = memoryview(memory)
        self._cells: memoryview[int] = octets.cast("q")
        self._numbers = self._cells[_NUMBER::_CELLS]
        self._rows = [CounterRow(octets, self._cells, index) for index in range(len(memory) // ROW_OCTETS)]
        self._known: list[int] = []
        self._found: dict[str, tuple[bool, list[int]]] = {}

    @classmethod
    def create(cls, rows: int = 128) -> CounterMap:
        """A new block with a descriptor that closes at exec unless it is passed on. Raises OSError."""
        fd = os.memfd_create("gateway-counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, rows * ROW_OCTETS)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls.attach(fd)

    @classmethod
    def attach(cls, fd: int) -> CounterMap:
        """The block that a descriptor is of. Raises OSError, and ValueError for what is no such block."""
        size = os.fstat(fd).st_size
        if size == 0 or size % ROW_OCTETS:
            raise ValueError(f"descriptor {fd} is no block of counters: {size} octets")
        return cls(mmap.mmap(fd, size), fd)

    @classmethod
    def private(cls) -> CounterMap:
        """One row that no other process sees."""
        return cls(mmap.mmap(-1, ROW_OCTETS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), -1)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> CounterRow:
        """One of the rows, from 0."""
        return self._rows[index]

    def totals(self) -> dict[str, int]:
        """Every series with its number over all rows."""
        totals: dict[str, int] = {}
        for row in self._rows:
            if row.number:
                for (sample, kind), value in zip(row.series(), row.values(), strict=True):
                    known = totals.get(sample, 0)
                    totals[sample] = max(known, value) if kind == "m" else known + value
        return totals

    def total(self, sample: str) -> int:
        """The number of one series over all rows, 0 if nobody counted it; a few microseconds."""
        numbers = self._numbers.tolist()
        if numbers != self._known:  # there are new series
            self._known = numbers
            self._found.clear()
        found = self._found.get(sample)
        if found is None:
            found = self._found[sample] = self._find(sample)
        highest, places = found
        cells = self._cells
        if highest:
            return max((cells[place] for place in places), default=0)
        return sum([cells[place] for place in places])

    def _find(self, sample: str) -> tuple[bool, list[int]]:
        """Whether the highest counts, and where the series' numbers are."""
        highest, places = False, []
        for row in self._rows:
            count = row.find(sample) if row.number else None
            if count is not None:
                place = count.cell[1]
                highest = row.series()[place % _CELLS - _HEADER][1] == "m"
                places.append(place)
        return highest, places
