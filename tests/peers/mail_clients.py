"""IMAP and POP3 clients: curl, fetchmail and mbsync as programs, Python's imaplib and poplib. All block: see process.py.

Each takes a `Place` and a `Mode`, and verifies the server's certificate for `localhost` where there is one.
"""

from __future__ import annotations

import imaplib
import poplib
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tests.peers.dovecot_store import User
from tests.peers.require import require

LIMIT = 60.0

Protocol = Literal["imap", "pop3"]
Mode = Literal["plain", "starttls", "tls"]
MODES: tuple[Mode, ...] = ("plain", "starttls", "tls")


@dataclass(frozen=True)
class Place:
    """A server on loopback: the port for clear text and STARTTLS, that for implicit TLS, who signed its certificate."""

    protocol: Protocol
    plain: int
    tls: int
    ca: Path

    def port(self, mode: Mode) -> int:
        """The port for this mode."""
        return self.tls if mode == "tls" else self.plain

    def context(self) -> ssl.SSLContext:
        """TLS that trusts the authority and nobody else."""
        return ssl.create_default_context(cafile=str(self.ca))


class Run(NamedTuple):
    """How a program ended, what it fetched, what it said."""

    status: int
    content: bytes
    said: str


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a program in a folder, its home too; its output goes to a file, since progress dots may be many."""
    output = folder / "said"
    with output.open("wb") as file:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=LIMIT, check=False, cwd=folder,
            env={"HOME": str(folder), "PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )  # fmt: skip
    return ended.returncode, output.read_text(errors="replace")[-20_000:]


def curl(place: Place, mode: Mode, user: User, folder: Path, path: str = "", *options: str) -> Run:
    """`path` such as `INBOX;MAILINDEX=1` (IMAP) or `1` (POP3). Status 67 is a refused login, 78 no such message.

    Of use: `--login-options AUTH=CRAM-MD5`, `AUTH=+APOP`; `--oauth2-bearer TOKEN`; `-T FILE` to append.
    """
    scheme = place.protocol + ("s" if mode == "tls" else "")
    fetched = folder / "fetched"
    fetched.unlink(missing_ok=True)
    command = [
        require("curl"), "-sSv4", "--max-time", str(int(LIMIT)), "-o", str(fetched), "--cacert", str(place.ca),
        *(["--ssl-reqd"] if mode == "starttls" else []), "--user", f"{user.name}:{user.password}", *options,
        f"{scheme}://localhost:{place.port(mode)}/{path}",
    ]  # fmt: skip
    status, said = run(command, folder)
    return Run(status, fetched.read_bytes() if fetched.exists() else b"", said)


def curl_fetch(place: Place, mode: Mode, user: User, folder: Path, *options: str) -> Run:
    """The first message, whole."""
    return curl(place, mode, user, folder, "1" if place.protocol == "pop3" else "INBOX;MAILINDEX=1", *options)


def fetchmail(place: Place, mode: Mode, user: User, folder: Path, *, apop: bool = False, auth: str = "password") -> Run:
    """All messages, one behind the other. Status 0: fetched, 1: none there, 3: the login failed.

    fetchmail puts a Received field in front and ends lines in LF.
    """
    fetched, rc = folder / "fetched", folder / "fetchmailrc"
    fetched.unlink(missing_ok=True)
    tls = {"plain": 'sslproto ""', "starttls": "sslproto TLS1.2+", "tls": "ssl sslproto TLS1.2+"}[mode]
    trust = "" if mode == "plain" else f'sslcertck sslcertfile "{place.ca}" sslcertpath "{folder}"'
    protocol = "APOP" if apop else place.protocol.upper()
    rc.write_text(
        f"set no bouncemail\npoll localhost service {place.port(mode)} protocol {protocol}"
        f"{'' if apop else f' auth {auth}'}\n"
        f"user '{user.name}' password '{_escaped(user.password)}' keep fetchall no rewrite mda \"cat >> {fetched}\"\n"
        f"{tls} {trust}\n"
    )
    rc.chmod(0o600)
    command = [
        require("fetchmail"), "-f", str(rc), "--pidfile", str(folder / "pid"), "--idfile", str(folder / "ids"),
        "--nosyslog", "--nodetach", "--timeout", str(int(LIMIT)), "--verbose",
    ]  # fmt: skip
    status, said = run(command, folder)
    return Run(status, fetched.read_bytes() if fetched.exists() else b"", said)


def mbsync(place: Place, mode: Mode, user: User, folder: Path, *, mechanism: str = "LOGIN", push: bool = False) -> Run:
    """The inbox into the Maildir `folder/INBOX`, or with `push` the other way round; what is fetched is its messages.

    mbsync ends lines in LF and adds the field X-TUID to what it fetches.
    """
    rc, inbox = folder / "mbsyncrc", folder / "INBOX"
    for name in ("new", "cur", "tmp"):
        (inbox / name).mkdir(parents=True, exist_ok=True)
    password = _escaped(user.password).replace('"', '\\"')
    kind = {"plain": "None", "starttls": "STARTTLS", "tls": "IMAPS"}[mode]
    rc.write_text(
        f"IMAPAccount peer\nHost localhost\nPort {place.port(mode)}\nUser {user.name}\n"
        f'Pass "{password}"\nSSLType {kind}\nAuthMechs {mechanism}\nTimeout {int(LIMIT)}\n'
        f"CertificateFile {place.ca}\n\nIMAPStore far\nAccount peer\n\n"
        f"MaildirStore near\nPath {folder}/\nInbox {inbox}\n\n"
        f"Channel all\nFar :far:\nNear :near:\nSync {'Push' if push else 'Pull'}\nSyncState *\n"
    )
    rc.chmod(0o600)
    status, said = run([require("mbsync"), "-V", "-c", str(rc), "all"], folder)
    files = sorted(path for name in ("new", "cur") for path in (inbox / name).iterdir())
    return Run(status, b"".join(path.read_bytes() for path in files), said)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\")


def body(message: bytes) -> bytes:
    """What follows the header, with lines that end in CRLF; clients that store mail end them in LF."""
    return message.replace(b"\r\n", b"\n").partition(b"\n\n")[2].replace(b"\n", b"\r\n")


@contextmanager
def imap(place: Place, mode: Mode = "plain", source: str = "127.0.0.1") -> Iterator[imaplib.IMAP4]:
    """imaplib, after STARTTLS where the mode says so; not logged in. `source` is the client's own address."""
    connection = _Imap(place, mode, source)
    try:
        if mode == "starttls":
            connection.starttls(place.context())
        yield connection
    finally:
        with suppress(OSError):
            connection.shutdown()


@contextmanager
def pop3(place: Place, mode: Mode = "plain", source: str = "127.0.0.1") -> Iterator[poplib.POP3]:
    """poplib, after STLS where the mode says so; not logged in. `source` is the client's own address."""
    connection = _Pop3(place, mode, source)
    try:
        if mode == "starttls":
            connection.stls(place.context())
        yield connection
    finally:
        connection.close()


class _Imap(imaplib.IMAP4):
    def __init__(self, place: Place, mode: Mode, source: str) -> None:
        self._opening = (place, mode, source)
        super().__init__("localhost", place.port(mode), LIMIT)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        return _connected(*self._opening)


class _Pop3(poplib.POP3):
    def __init__(self, place: Place, mode: Mode, source: str) -> None:
        self._opening = (place, mode, source)
        super().__init__("localhost", place.port(mode), LIMIT)

    def _create_socket(self, timeout: float | None) -> socket.socket:
        return _connected(*self._opening)


def _connected(place: Place, mode: Mode, source: str) -> socket.socket:
    plain = socket.create_connection(("127.0.0.1", place.port(mode)), LIMIT, (source, 0))
    return place.context().wrap_socket(plain, server_hostname="localhost") if mode == "tls" else plain
