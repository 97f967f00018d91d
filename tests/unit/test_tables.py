"""Lists: what they find, when a file is read again, and what stays when it cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.tables import ListFile, NameTable, NetworkTable
from gateway.testing.stages import FakeClock


def numbers(entries: Iterable[str]) -> list[int]:
    return [int(entry) for entry in entries]


def test_inline_entries_are_a_lower_case_set() -> None:
    table = ListFile(["Alice@Example.org", "b"])
    assert "alice@example.org" in table
    assert "Alice@Example.org" not in table


def test_file_has_comments_blank_lines_any_line_end_and_a_bom(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes(b"\xef\xbb\xbf# head\r\n1 # one\r\n\r\n  2\n3#4\n")
    table = ListFile(path)
    assert table.current() == {"1", "2", "3#4"}


def test_file_is_reread_when_it_changed_but_not_more_than_once_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "list", FakeClock()
    path.write_text("1\n")
    table = ListFile(path, numbers, clock=clock)
    path.write_text("1\n2\n")
    assert table.current() == [1]
    clock.advance(1)
    assert table.current() == [1, 2]


def test_a_file_that_was_replaced_counts_as_changed(tmp_path: Path) -> None:
    path, other, clock = tmp_path / "list", tmp_path / "new", FakeClock()
    path.write_text("1\n")
    table = ListFile(path, numbers, clock=clock)
    other.write_text("2\n")
    os.utime(other, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    clock.advance(1)
    assert table.current() == [2]


def test_an_unchanged_file_is_not_parsed_again(tmp_path: Path) -> None:
    path, clock, calls = tmp_path / "list", FakeClock(), []
    path.write_text("1\n")
    table = ListFile(path, lambda entries: calls.append(list(entries)), clock=clock)
    clock.advance(5)
    table.current()
    assert calls == [["1"]]


@pytest.mark.parametrize("spoil", ["remove", "wrong", "binary"])
def test_what_cannot_be_read_leaves_the_old_content_and_one_warning(tmp_path: Path, spoil: str) -> None:
    path, clock = tmp_path / "list", FakeClock()
    path.write_text("1\n")
    table = ListFile(path, numbers, clock=clock)
    if spoil == "remove":
        path.unlink()
    else:
        path.write_bytes(b"2\nx\n" if spoil == "wrong" else b"2\n\xff\xfe")
    with capture_logs() as logs:
        for _ in range(3):
            clock.advance(1)
            assert table.current() == [1]
    assert [record["event"] for record in logs] == ["list_unreadable"]
    path.write_text("3\n4\n")
    clock.advance(1)
    assert table.current() == [3, 4]


def test_errors_at_the_start_name_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ListFile(tmp_path / "none")
    path = tmp_path / "list"
    path.write_text("1\n# two\nthree\n4\n")
    with pytest.raises(ValueError, match=r"list:3: invalid literal"):
        ListFile(path, numbers)
    path.write_bytes(b"1\n2\n\xff\n")
    with pytest.raises(ValueError, match=r"list:3: not UTF-8"):
        ListFile(path, numbers)


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("10.1.2.3", (32, "one")),
        ("10.1.2.4", (24, "net")),
        ("10.1.9.9", (8, "ten")),
        ("::ffff:10.1.2.3", (32, "one")),
        ("192.0.2.1", None),
        ("2001:db8:0:1::5", (64, "subnet")),
        ("2001:db8::5", (32, "six")),
        ("::a01:203", None),
        ("", None),
        ("/run/socket", None),
    ],
)
def test_longest_prefix_wins(address: str, found: tuple[int, str] | None) -> None:
    table: NetworkTable[str] = NetworkTable()
    for network, value in {
        "10.0.0.0/8": "ten", "10.1.2.3": "one", "10.1.2.0/24": "net",
        "2001:db8::/32": "six", "2001:db8:0:1::/64": "subnet",
    }.items():  # fmt: skip
        table.add(network, value)
    assert table.find(address) == found


@pytest.mark.parametrize("wrong", ["", "example.org", "10.0.0.1/8", "10.0.0.0/33", "10.0.0"])
def test_what_is_no_network_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"network|prefix"):
        NetworkTable[str]().add(wrong, "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Bob@Example.org", "bob"),
        ("eve@example.org", "domain"),
        ("example.org", "domain"),
        ("x@a.example.org", "below"),
        ("x@b.a.example.org", "below"),
        ("x@deep.b.example.org", "deeper"),
        ("x@b.example.org", "below"),
        ("x@badexample.org", None),
        ("postmaster@elsewhere.test", "local"),
        ("postmaster@example.org", "domain"),
        ('"a@example.org"', None),
        ("alice", "user"),
        ("", None),
    ],
)
def test_most_specific_name_wins(name: str, value: str | None) -> None:
    table: NameTable[str] = NameTable()
    for pattern, text in {
        "bob@EXAMPLE.org": "bob", "@example.org": "domain", ".example.org": "below", ".b.example.org": "deeper",
        "postmaster@": "local", "alice": "user",
    }.items():  # fmt: skip
        table.add(pattern, text)
    found = table.find(name)
    assert (found[1] if found else None) == value


@pytest.mark.parametrize("wrong", ["", "@", ".", "..org", "a..org", "a b", "example.org."])
def test_what_is_no_name_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="is not a name"):
        NameTable[str]().add(wrong, "")
