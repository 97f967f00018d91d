"""Counters that processes share: sums, rows that change hands, writers that die."""

from __future__ import annotations

import os
import signal

import pytest

from gateway.observe import counters
from gateway.observe.counters import LOST, CounterMap


def test_rows_add_up() -> None:
    shared = CounterMap.create(3)
    other = CounterMap.attach(shared.fd)
    for index, number in ((0, 5), (2, 7)):
        shared.row(index).slot('a{x="1"}').add(number)
    shared.row(2).slot("b").add()
    assert other.totals() == {'a{x="1"}': 12, "b": 1, LOST: 0}
    assert (other.total('a{x="1"}'), other.total("b"), other.total("c")) == (12, 1, 0)
    shared.row(1).slot("c").add(3)  # a series that came later, in a row that had none
    shared.row(0).slot("b").add(2)
    assert (other.total("c"), other.total("b")) == (3, 3)


def test_a_series_is_one_number_for_all_who_ask() -> None:
    row = CounterMap.private().row(0)
    row.slot("a").add(2)
    row.slot("a").add(-1)
    assert row.slot("a").value == 1
    row.slot("a").set(9)
    assert row.find("a") is not None and row.values() == [0, 9]


def test_gauges_are_sums_or_the_highest_and_go_with_their_owner() -> None:
    shared = CounterMap.create(2)
    for index, number in ((0, 4), (1, 6)):
        row = shared.row(index)
        row.take(100 + index)
        row.beat(77)
        row.slot("sum", "g").set(number)
        row.slot("highest", "m").set(number)
        row.slot("counter").set(number)
    assert shared.totals() == {"sum": 10, "highest": 6, "counter": 10, LOST: 0}
    assert (shared.total("sum"), shared.total("highest")) == (10, 6)
    shared.row(1).take(0)
    assert (shared.row(1).owner, shared.row(1).heartbeat, shared.row(0).owner) == (0, 0, 100)
    assert shared.totals() == {"sum": 4, "highest": 4, "counter": 10, LOST: 0}


@pytest.mark.parametrize("full", ["numbers", "text"])
def test_what_has_no_room_is_counted_together(full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if full == "numbers":
        monkeypatch.setattr(counters, "SERIES", 3)
    shared = CounterMap.create(2)
    before = shared.row(1)
    before.slot("neighbor").set(1)
    row = shared.row(0)
    size = 60_000 if full == "text" else 1
    names = [str(number) * size for number in range(10)] * 4 if full == "numbers" else [
        f"{number:0{size}}" for number in range(40)
    ]  # fmt: skip
    for name in names:
        row.slot(name).add()
    totals = shared.totals()
    assert totals[LOST] > 0
    assert sum(totals.values()) == len(names) + 1
    assert CounterMap.attach(shared.fd).totals() == totals  # the row after it is whole


def test_a_gauge_that_has_no_room_leaves_the_counter_of_what_is_lost_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "SERIES", 2)
    row = CounterMap.private().row(0)
    row.slot("a").add()
    row.slot("b").add(7)
    for kind in ("g", "m"):
        gauge = row.slot("gauge", kind)
        gauge.set(3)
        gauge.add(-1)
        assert gauge.value == 2
    assert row.values() == [7, 1]


def test_no_block_of_counters() -> None:
    fd = os.memfd_create("x")
    with pytest.raises(ValueError, match="no block of counters"):
        CounterMap.attach(fd)
    os.ftruncate(fd, 100)
    with pytest.raises(ValueError, match="100 octets"):
        CounterMap.attach(fd)
    os.close(fd)


def test_the_block_cannot_be_cut_under_its_readers() -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(CounterMap.create(1).fd, 4096)


def _worker(shared: CounterMap, index: int, written: int, confirmed: int) -> None:
    """Count for ever, and say so after each; never returns."""
    row = shared.row(index)
    row.take(os.getpid())
    row.slot("open", "g").add()
    while True:
        row.slot(f'n{{x="{row.number % 50}"}}').add()
        os.write(written, b".")
        if os.read(confirmed, 1) == b"":
            os._exit(0)


def test_who_is_killed_loses_nothing_and_who_comes_after_goes_on() -> None:
    shared = CounterMap.create(2)
    counted = 0
    for _ in range(5):  # each takes the same row
        out, written = os.pipe()
        confirmed, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(out)
            os.close(into)
            try:
                _worker(CounterMap.attach(shared.fd), 1, written, confirmed)
            finally:
                os._exit(1)
        os.close(written)
        os.close(confirmed)
        for step in range(20):
            assert os.read(out, 1) == b"."
            counted += 1
            if step < 19:
                os.write(into, b".")
        assert shared.total("open") == 1
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(out)
        os.close(into)
        assert shared.row(1).owner == pid
        shared.row(1).take(0)
        totals = shared.totals()
        assert sum(value for name, value in totals.items() if name.startswith("n{")) == counted
        assert totals["open"] == 0


def test_a_name_that_was_not_finished_is_written_again() -> None:
    shared = CounterMap.create(1)
    shared.row(0).slot("first").add()
    row = CounterMap.attach(shared.fd).row(0)
    row.slot("half").add()
    cells, _ = row.slot("half").cell
    cells[2] = 2  # as if its writer had died before it said that there is one more
    fresh = CounterMap.attach(shared.fd)
    assert fresh.totals() == {LOST: 0, "first": 1}
    fresh.row(0).slot("another").set(5)
    assert shared.totals() == {LOST: 0, "first": 1, "another": 5}
