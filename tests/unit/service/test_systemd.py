"""The datagrams and descriptors of sd_notify(3) and sd_listen_fds(3)."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.service import systemd
from gateway.service.systemd import ActivationError, Notifier, child_environment, inherited_sockets, match


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


def heard(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_what_the_manager_hears(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "20000000"})
    assert notifier and notifier.watchdog_seconds == 10
    notifier.ready("2 workers\nREADY=0")
    assert heard(manager) == ["READY=1", "STATUS=2 workers READY=0"]
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    first, second = heard(manager)
    assert first == "RELOADING=1"
    name, _, moment = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(moment) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.status("draining")
    assert heard(manager) == ["STATUS=draining"]
    notifier.watchdog()
    assert heard(manager) == ["WATCHDOG=1"]
    notifier.stopping("3 sessions", seconds=32.5)
    assert heard(manager) == ["STOPPING=1", "STATUS=3 sessions", "EXTEND_TIMEOUT_USEC=32500000"]
    notifier.status("")
    with pytest.raises(BlockingIOError):
        manager.recv(1)


def test_abstract_socket() -> None:
    name = f"gateway-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        Notifier({"NOTIFY_SOCKET": "@" + name}).ready()
        assert heard(sock) == ["READY=1"]


def test_nobody_to_tell() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000000"})
    assert not notifier and notifier.watchdog_seconds is None
    notifier.ready()
    notifier.watchdog()


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog(variables: dict[str, str], seconds: float | None, manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname(), **variables})
    assert notifier.watchdog_seconds == seconds
    notifier.watchdog()
    if seconds is None:
        with pytest.raises(BlockingIOError):
            manager.recv(1)
    else:
        assert heard(manager) == ["WATCHDOG=1"]


def test_unknown_form_of_address() -> None:
    with pytest.raises(ActivationError, match="vsock:2:1: neither a path nor @name"):
        Notifier({"NOTIFY_SOCKET": "vsock:2:1"})


def test_a_manager_that_is_gone_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []

    class Log:
        def warning(self, record: str, text: str) -> None:
            warnings.append(text)

    monkeypatch.setattr(systemd, "log", Log())
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    notifier.ready()
    notifier.status("again")
    assert warnings == ["the service manager does not take notifications: No such file or directory"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "gone"))
        notifier.ready()
    os.unlink(tmp_path / "gone")
    notifier.ready()
    assert len(warnings) == 2


def test_children_do_not_speak_for_the_service() -> None:
    environ = dict.fromkeys(systemd.OWN_VARIABLES, "1") | {"PATH": "/bin", "RUNTIME_DIRECTORY": "/run/gateway"}
    assert child_environment(environ) == {"PATH": "/bin", "RUNTIME_DIRECTORY": "/run/gateway"}


# --- socket activation: a process of its own, since descriptor 3 is the test runner's


CHILD = """
import fcntl, json, os, sys
from gateway.service.systemd import ActivationError, address_text, inherited_sockets
os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[1]))
try:
    found = inherited_sockets()
except ActivationError as error:
    print("error:", error)
else:
    for sock in found:
        closed = bool(fcntl.fcntl(sock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
        print(sock.fileno(), address_text(sock), closed, sock.getblocking())
"""


def activated(
    sockets: list[socket.socket], *, count: str | None = None, names: str = "", other_pid: int = 0
) -> list[str]:
    """What a process sees that was started with these as 3, 4, ..."""
    spare = [fcntl.fcntl(sock, fcntl.F_DUPFD, 100) for sock in sockets]
    moves = " ".join(f"{3 + index}<&{number}" for index, number in enumerate(spare))
    line = f'exec "$0" -c "$1" "$2" {moves}'
    environ = {**os.environ, "LISTEN_FDS": count or str(len(sockets)), "LISTEN_FDNAMES": names}
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", line, sys.executable, CHILD, str(other_pid)],
            env=environ,
            pass_fds=spare,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        for number in spare:
            os.close(number)
    return done.stdout.splitlines()


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[list[socket.socket]]:
    sockets = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    sockets[1].bind(str(tmp_path / "lmtp.sock"))
    sockets[1].listen()
    yield sockets
    for sock in sockets:
        sock.close()


def test_inherited_sockets(listening: list[socket.socket]) -> None:
    port, path = listening[0].getsockname()[1], listening[1].getsockname()
    assert activated(listening, names="smtp:lmtp") == [f"3 127.0.0.1:{port} True False", f"4 unix:{path} True False"]
    assert activated(listening, other_pid=1) == []


def test_what_cannot_be_inherited(listening: list[socket.socket]) -> None:
    (said,) = activated(listening, count="many")
    assert said == "error: LISTEN_FDS=many: not a number"
    (said,) = activated(listening, count="3", names="smtp:lmtp:imap")
    assert said.startswith("error: inherited descriptor 5 (imap): no socket:")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket(socket.AF_INET) as silent:
        datagrams.bind(("127.0.0.1", 0))
        for wrong in (datagrams, silent):
            (said,) = activated([listening[0], wrong], names="smtp")
            assert said.startswith("error: inherited descriptor 4 (unnamed): not a listening stream socket")


def test_nothing_inherited() -> None:
    assert inherited_sockets({}) == []
    assert inherited_sockets({"LISTEN_FDS": "1"}) == []


@pytest.fixture
def wildcards() -> Iterator[list[socket.socket]]:
    """0.0.0.0 and [::] on one port, as systemd has them for two ListenStream= lines."""
    four = socket.create_server(("0.0.0.0", 0))
    six = socket.create_server(("::", four.getsockname()[1]), family=socket.AF_INET6)
    yield [four, six]
    four.close()
    six.close()


def test_match_by_address(listening: list[socket.socket], wildcards: list[socket.socket], tmp_path: Path) -> None:
    tcp, unix = listening
    four, six = wildcards
    everything = [*listening, *wildcards]
    port, any_port = tcp.getsockname()[1], four.getsockname()[1]
    (tmp_path / "run").symlink_to(tmp_path)
    assert match(everything, "127.0.0.1", port) is tcp
    assert match(everything, "127.0.0.1", port, family=socket.AF_INET) is tcp
    assert match(everything, "127.0.0.1", port, family=socket.AF_INET6) is None
    assert match(everything, "127.0.0.1", any_port) is None  # the wildcard is another address
    assert match(everything, "localhost", port) is None
    assert match(everything, path=str(tmp_path / "lmtp.sock")) is unix
    assert match(everything, path=str(tmp_path / "run" / "lmtp.sock")) is unix
    assert match(everything, path=str(tmp_path / "other.sock")) is None
    assert match(everything, port=any_port) is six
    assert match(everything, port=any_port, family=socket.AF_INET) is four
    assert match(everything, "0:0:0:0:0:0:0:0", any_port) is six
    assert match([four], port=any_port) is four
    assert match([], port=any_port) is None


def test_text_of_addresses(wildcards: list[socket.socket]) -> None:
    port = wildcards[0].getsockname()[1]
    assert [systemd.address_text(sock) for sock in wildcards] == [f"0.0.0.0:{port}", f"[::]:{port}"]
