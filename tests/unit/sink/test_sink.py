"""The embedded upstream: what it stores, XCLIENT, and that it ends when it should."""

from __future__ import annotations

import mailbox
import os
import signal
import smtplib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest

from gateway.sink.__main__ import listen_address
from gateway.sink.maildir import Maildir
from gateway.sink.process import EmbeddedServer


class Client(smtplib.SMTP):
    """smtplib on a unix socket."""

    def __init__(self, address: str) -> None:
        self._path = address.removeprefix("unix:")
        super().__init__("sink", 25, local_hostname="me.test", timeout=10)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        connection.connect(self._path)
        return connection


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    server, folder = EmbeddedServer("sink.test"), tmp_path_factory.mktemp("sink") / "mail"
    yield server.start(folder), folder
    server.stop()


@pytest.fixture
def client(sink: tuple[str, Path]) -> Iterator[Client]:
    for path in (sink[1] / "new").iterdir():
        path.unlink()
    with Client(sink[0]) as connection:
        yield connection


def stored(folder: Path) -> list[Message]:
    return list(mailbox.Maildir(folder, factory=None, create=False))


def send(client: Client, message: bytes, sender: str = "<a@x.test>", *recipients: str) -> tuple[int, bytes]:
    client.docmd("MAIL", f"FROM:{sender}")
    for recipient in recipients or ("<b@y.test>",):
        assert client.docmd("RCPT", f"TO:{recipient}")[0] == 250
    assert client.docmd("DATA")[0] == 354
    client.send(message + b".\r\n")
    return client.getreply()


def test_announces_what_it_understands(client: Client) -> None:
    client.ehlo()
    assert client.esmtp_features["xclient"] == "NAME REVERSE_NAME ADDR PORT PROTO HELO LOGIN DESTADDR DESTPORT"
    assert {"size", "8bitmime", "smtputf8", "pipelining"} <= set(client.esmtp_features)
    assert not {"auth", "starttls"} & set(client.esmtp_features)


def test_stores_envelope_and_content(client: Client, sink: tuple[str, Path]) -> None:
    client.ehlo()
    content = b"Subject: hi\r\n\r\n..stuffed\r\nbare\nLF \xff\x00\r\n"
    code, text = send(client, content, "<a@x.test>", "<b@y.test>", "<C@Z.test>")
    assert code == 250 and text.startswith(b"2.0.0 Ok: queued as ")
    (path,) = (sink[1] / "new").iterdir()
    assert path.read_bytes().endswith(b"\r\n" + content.replace(b"..stuffed", b".stuffed"))
    assert path.stat().st_mode & 0o777 == 0o600 and not list((sink[1] / "tmp").iterdir())
    (message,) = stored(sink[1])
    assert message["Return-Path"] == "<a@x.test>"
    assert message.get_all("Delivered-To") == ["b@y.test", "C@Z.test"]
    assert (message["X-Client-Helo"], message["X-Client-Proto"]) == ("me.test", "ESMTP")
    assert "X-Client-Login" not in message and "X-Client-Addr" not in message
    assert text.split()[-1].decode() in message["Received"] and "by sink.test with ESMTP" in message["Received"]


def test_null_sender_and_utf8(client: Client, sink: tuple[str, Path]) -> None:
    client.ehlo()
    assert send(client, b"\r\n", "<>")[0] == 250
    client.docmd("MAIL", "FROM:<> SMTPUTF8 BODY=8BITMIME")
    client.command_encoding = "utf-8"
    assert client.docmd("RCPT", "TO:<bj\u00f6rn@y.test>")[0] == 250
    client.docmd("DATA")
    client.send(b".\r\n")
    assert client.getreply()[0] == 250
    texts = [path.read_bytes() for path in (sink[1] / "new").iterdir()]
    assert all(text.startswith(b"Return-Path: <>\r\n") for text in texts)
    assert any("Delivered-To: bj\u00f6rn@y.test".encode() in text for text in texts)


def test_xclient(client: Client, sink: tuple[str, Path]) -> None:
    client.ehlo()
    code, text = client.docmd(
        "XCLIENT",
        "ADDR=IPV6:2001:db8::7 PORT=4711 NAME=[UNAVAILABLE] REVERSE_NAME=[TEMPUNAVAIL] HELO=h.test PROTO=SMTP "
        "LOGIN=tim+2Bx+3Dy+40z+20+C3+A9 DESTADDR=192.0.2.1 DESTPORT=587",
    )
    assert (code, text[:9]) == (220, b"sink.test")
    assert client.docmd("MAIL", "FROM:<a@x.test>")[0] == 503  # it started over
    client.ehlo("real.test")
    assert send(client, b"\r\n")[0] == 250
    (message,) = stored(sink[1])
    assert {name: str(message[f"X-Client-{name}"]) for name in (
        "Addr", "Port", "Name", "Reverse-Name", "Helo", "Proto", "Dest-Addr", "Dest-Port",
    )} == {
        "Addr": "2001:db8::7", "Port": "4711", "Name": "[UNAVAILABLE]", "Reverse-Name": "[TEMPUNAVAIL]",
        "Helo": "h.test", "Proto": "SMTP", "Dest-Addr": "192.0.2.1", "Dest-Port": "587",
    }  # fmt: skip
    raw = next((sink[1] / "new").iterdir()).read_bytes()
    assert "X-Client-Login: tim+x=y@z \u00e9\r\n".encode() in raw

    assert client.docmd("XCLIENT", "ADDR=192.0.2.9")[0] == 220  # without LOGIN, HELO, PROTO: they are gone
    client.ehlo("next.test")
    for path in (sink[1] / "new").iterdir():
        path.unlink()
    assert send(client, b"\r\n")[0] == 250
    (message,) = stored(sink[1])
    assert (message["X-Client-Addr"], message["X-Client-Helo"], message["X-Client-Proto"]) == (
        "192.0.2.9", "next.test", "ESMTP",
    )  # fmt: skip
    assert "X-Client-Login" not in message


@pytest.mark.parametrize(
    ("arguments", "code"),
    [("", 501), ("ADDR=nonsense", 501), ("WHAT=ever", 501), ("LOGIN=a+0D+0Ab", 501), ("LOGIN=" + "a" * 300, 501)],
)
def test_bad_xclient_changes_nothing(client: Client, sink: tuple[str, Path], arguments: str, code: int) -> None:
    client.ehlo()
    assert client.docmd("XCLIENT", arguments)[0] == code
    assert send(client, b"\r\n")[0] == 250
    assert "X-Client-Addr" not in stored(sink[1])[0]


def test_no_xclient_in_a_transaction(client: Client) -> None:
    client.ehlo()
    client.docmd("MAIL", "FROM:<a@x.test>")
    assert client.docmd("XCLIENT", "ADDR=192.0.2.9")[0] == 503


def test_pipelined_commands(client: Client, sink: tuple[str, Path]) -> None:
    client.ehlo()
    client.send(b"MAIL FROM:<a@x.test>\r\nRCPT TO:<b@y.test>\r\nDATA\r\n")
    assert [client.getreply()[0] for _ in range(3)] == [250, 250, 354]
    client.send(b"x: y\r\n\r\n" + b"l" * 20_000 + b"\r\n.\r\nQUIT\r\n")
    assert [client.getreply()[0] for _ in range(2)] == [250, 221]
    assert len(stored(sink[1])) == 1


def test_full_disk_is_temporary(sink: tuple[str, Path], client: Client) -> None:
    client.ehlo()
    (sink[1] / "tmp").rename(sink[1] / "gone")
    try:
        code, text = send(client, b"\r\n")
    finally:
        (sink[1] / "gone").rename(sink[1] / "tmp")
    assert code == 452 and text.startswith(b"4.3.1") and str(sink[1]).encode() not in text


def test_maildir_leaves_nothing_half_written(tmp_path: Path) -> None:
    maildir = Maildir(tmp_path / "m")
    (tmp_path / "m" / "new").rmdir()
    with pytest.raises(OSError, match="No such file"):
        maildir.store(b"head", b"body")
    assert not list((tmp_path / "m" / "tmp").iterdir())


# -- its life ------------------------------------------------------------------------------------------------


def test_stop_leaves_nothing(tmp_path: Path) -> None:
    server = EmbeddedServer()
    address = server.start(tmp_path / "mail")
    pid, path = server.pid, Path(address.removeprefix("unix:"))
    assert server.running and path.is_socket() and path.parent.stat().st_mode & 0o777 == 0o700
    descriptors = len(os.listdir("/proc/self/fd"))
    server.stop()
    server.stop()
    assert not server.running and not path.parent.exists()
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys; from gateway.sink.process import EmbeddedServer; s = EmbeddedServer();"
        "print(s.start(sys.argv[1]), s.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        address, pid = parent.stdout.readline().split()
        with Client(address):
            parent.kill()
            parent.wait()
    until(lambda: gone(int(pid)))
    assert not Path(address.removeprefix("unix:")).parent.exists()


def test_sigterm_ends_it_with_status_0(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(
        [sys.executable, "-m", "gateway.sink", "--maildir", str(tmp_path), "--listen", "127.0.0.1:0",
         "--ready-fd", str(theirs.fileno())], pass_fds=(theirs.fileno(),),
    ) as process:  # fmt: skip
        word, address = ours.recv(200).decode().split()
        host, port = address.split(":")
        with smtplib.SMTP(host, int(port), timeout=10) as connection:
            connection.sendmail("a@x.test", "b@y.test", "Subject: tcp\n\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert word == "listening"
    assert stored(tmp_path)[0]["X-Client-Addr"] == "127.0.0.1"


def test_why_it_does_not_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    server = EmbeddedServer()
    with pytest.raises(RuntimeError, match="file"):
        server.start(tmp_path / "file")
    assert not server.running and server.pid is None
    assert "gateway.sink:" in capfd.readouterr().err
    with pytest.raises(TimeoutError):
        server.start(tmp_path / "mail", timeout=0)
    assert server.start(tmp_path / "mail")  # the object is of use after a failure
    with pytest.raises(RuntimeError, match="already"):
        server.start(tmp_path / "mail")
    server.stop()


@pytest.mark.parametrize("text", ["0.0.0.0:25", "192.0.2.1:25", "127.0.0.1", "localhost:25", ""])
def test_listens_on_this_machine_only(text: str) -> None:
    with pytest.raises(ValueError):
        listen_address(text)


def gone(pid: int) -> bool:
    """Whether a process that is not our child is gone, or only waits for its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(true: object, limit: float = 10.0) -> None:
    """Poll for an event in another process, under a deadline."""
    end = time.monotonic() + limit
    assert callable(true)
    while not true():
        assert time.monotonic() < end
        os.sched_yield()
