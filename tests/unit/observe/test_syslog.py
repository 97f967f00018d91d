"""Syslog: the form of a message, and daemons that are away."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.observe import logs, syslog
from gateway.observe.sinks import Level
from gateway.observe.syslog import Syslog, parse_address

FORM = re.compile(r"<(\d+)>([A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d) (?:(\S+) )?([\w.-]+)\[(\d+)\]: (.*)")
NOW = time.time()


@pytest.fixture
def udp() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(10)
        yield sock


def url(sock: socket.socket) -> str:
    return f"udp://127.0.0.1:{sock.getsockname()[1]}"


def local(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    sock.settimeout(10)
    return sock


def text(packet: bytes) -> str:
    match = FORM.fullmatch(packet.decode())
    assert match is not None, packet
    return match[6]


def test_records_over_udp(udp: socket.socket) -> None:
    logs.route([Syslog(url(udp), "info", facility="local7", tag="mx", hostname="gw")])
    try:
        logs.get_logger("x").warning("auth", session="7KQ2-M9X", client="192.0.2.1", user="a\nb\u00e9")
        logs.get_logger("x").debug("stop")
        logs.get_logger("x").error("stop")
    finally:
        logs.configure("json")
    match = FORM.fullmatch(udp.recv(4096).decode())
    assert match is not None
    assert match.group(1, 3, 4, 5) == (str(23 * 8 + 4), "gw", "mx", str(os.getpid()))
    assert match[6] == '*7KQ2-M9X client logged in, client: 192.0.2.1, user: "a\\nb\u00e9"'
    assert abs(time.mktime(time.strptime(f"{time.localtime().tm_year} {match[2]}", "%Y %b %d %H:%M:%S")) - NOW) < 86400
    assert udp.recv(4096).startswith(b"<187>")


@pytest.mark.parametrize(
    ("level", "priority"), [(10, 23), (20, 22), (25, 21), (30, 20), (40, 19), (50, 18)]
)  # fmt: skip
def test_severities(udp: socket.socket, level: int, priority: int) -> None:
    Syslog(url(udp)).write(b"x", level, NOW)
    assert udp.recv(4096).startswith(b"<%d>" % priority)


def test_days_below_ten_have_a_blank(udp: socket.socket) -> None:
    Syslog(url(udp), hostname="h").write(b"x", 20, time.mktime((2026, 3, 5, 4, 5, 6, 0, 0, -1)))
    assert udp.recv(4096) == b"<22>Mar  5 04:05:06 h gateway[%d]: x" % os.getpid()


@pytest.mark.parametrize(
    ("hostname", "over_udp", "at_home"),
    [(None, socket.gethostname().partition(".")[0], None), ("", None, None), ("gw.example", "gw.example", "gw.example")],
)
def test_host_name(
    udp: socket.socket, tmp_path: Path, hostname: str | None, over_udp: str | None, at_home: str | None
) -> None:
    with local(tmp_path / "log") as daemon:
        for sock, address, expected in ((udp, url(udp), over_udp), (daemon, f"unix:{tmp_path}/log", at_home)):
            Syslog(address, hostname=hostname).write(b"x", 20, NOW)
            match = FORM.fullmatch(sock.recv(4096).decode())
            assert match is not None and match[3] == expected


def test_a_message_has_its_size(udp: socket.socket, tmp_path: Path) -> None:
    with local(tmp_path / "log") as daemon:
        for sock, address, size in ((udp, url(udp), 1024), (daemon, f"unix:{tmp_path}/log", 2048)):
            sink = Syslog(address, hostname="h")
            for shift in range(3):
                sink.write(b"x" * shift + "\u4e2d".encode() * 3000, 20, NOW)
                packet = sock.recv(65536)
                assert size - 3 < len(packet) <= size and packet.decode().endswith("\u4e2d...")


def test_a_local_daemon_that_is_away_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sink = Syslog(f"unix:{path}")
    for _ in range(3):
        sink.write(b"lost", 20, NOW)
    with local(path) as daemon:
        sink.write(b"still within the pause", 20, NOW + syslog.PAUSE / 2)
        sink.write(b"one", 20, NOW + syslog.PAUSE)
        sink.write(b"two", 20, NOW + syslog.PAUSE)
        said = [text(daemon.recv(4096)) for _ in range(3)]
    assert said[0] == "one" and said[2] == "two"
    assert said[1] == '4 records before this one were lost, error: "No such file or directory"'
    path.unlink()
    with local(path) as daemon:  # made anew while nothing was sent
        sink.write(b"three", 20, NOW + 5)
        assert text(daemon.recv(4096)) == "three"


def test_a_daemon_that_is_slow_loses_what_it_has_no_room_for(tmp_path: Path) -> None:
    with local(tmp_path / "log") as daemon:
        sink = Syslog(f"unix:{tmp_path}/log")
        sent = 0
        while not sink.lost:
            sink.write(b"x", 20, NOW)
            sent += 1
        for _ in range(sent - 1):
            daemon.recv(4096)
        sink.write(b"after", 20, NOW)  # at once: the daemon is there
        assert text(daemon.recv(4096)) == "after"
        assert text(daemon.recv(4096)).startswith("1 records before")


def test_a_daemon_over_udp_that_is_away_comes_back(udp: socket.socket) -> None:
    address, port = url(udp), udp.getsockname()[1]
    udp.close()
    sink = Syslog(address)
    for second in range(4):  # each that seems to be sent is told of by the next
        sink.write(b"lost", 20, NOW + 2 * second)
    assert sink.lost == 4
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as daemon:
        daemon.bind(("127.0.0.1", port))
        daemon.settimeout(10)
        for number in range(3):
            sink.write(b"%d" % number, 20, NOW + 20 + number)
        said = [text(daemon.recv(4096)) for _ in range(4)]
    assert [one for one in said if one.isdigit()] == ["0", "1", "2"]
    assert sum("4 records before this one were lost" in one for one in said) == 1


def test_the_end_says_what_was_lost(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sink = Syslog(f"unix:{path}")
    sink.write(b"lost", 20, NOW)
    with local(path) as daemon:
        sink.close()
        assert text(daemon.recv(4096)).startswith("1 records before")


def test_a_closed_sink_raises_nothing(udp: socket.socket) -> None:
    sink = Syslog(url(udp))
    sink.close()
    sink.write(b"x", 20, NOW)
    sink.close()
    assert sink.lost == 1


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("udp://127.0.0.1:1514", ("127.0.0.1", 1514)), ("udp://log.example", ("log.example", 514)),
        ("udp://[::1]:5", ("::1", 5)), ("udp://[::1]", ("::1", 514)), ("unix:/dev/log", "/dev/log"),
    ],
)  # fmt: skip
def test_addresses(written: str, address: object) -> None:
    assert parse_address(written) == address


@pytest.mark.parametrize(
    "written", ["", "udp://", "udp://a:0", "udp://a:65536", "unix:log", "tcp://a:1", "udp://::1", "udp://a b", "udp://a:1\n"]
)
def test_what_is_no_address(written: str) -> None:
    with pytest.raises(ValueError, match="is not udp"):
        parse_address(written)


@pytest.mark.parametrize("level", ["debug", "info", "notice", "warning", "error", "critical"])
def test_levels(level: Level, tmp_path: Path) -> None:
    assert Syslog(f"unix:{tmp_path}/x", level).threshold == logs.LEVELS[level]
