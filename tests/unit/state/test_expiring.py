"""The expiring dictionary."""

from __future__ import annotations

from gateway.state.expiring import ExpiringDict


def test_oldest_makes_room() -> None:
    entries: ExpiringDict[int, str] = ExpiringDict(3)
    for i in range(3):
        entries.put(i, "x", 100, 0)
    entries.put(0, "again", 100, 0)  # the youngest now
    entries.put(3, "x", 100, 0)
    assert [entries.get(i, 1) for i in range(4)] == ["again", None, "x", "x"]


def test_expired_ones_go_first() -> None:
    entries: ExpiringDict[int, str] = ExpiringDict(3)
    entries.put(0, "stays", 100, 0)
    entries.put(1, "goes", 5, 0)
    entries.put(2, "stays", 100, 0)
    entries.put(3, "new", 100, 10)
    assert [entries.get(i, 10) for i in range(4)] == ["stays", None, "stays", "new"]
