"""The common kinds of nginx configuration with a test's ports in them, imported by `gateway import-nginx` and served."""

from __future__ import annotations

import shutil
import smtplib
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.interop.store_site import StoreSite, fetch_imap
from tests.peers.dovecot_store import User
from tests.peers.mail_clients import Mode, Place, Protocol, imap, pop3
from tests.peers.process import Process
from tests.peers.require import require

CONFIGS = Path(__file__).parents[1] / "unit/nginx/configs"
GATEWAY = str(Path(sys.executable).with_name("gateway"))
LIMIT = 20.0
SUBJECT = "by way of nginx.conf"


def configuration(kind: str, folder: Path, site: StoreSite, changes: Mapping[str, object]) -> Path:
    """Copy a configuration and its certificates to `folder`. `changes`: each text of it that the test needs otherwise."""
    text = (CONFIGS / f"{kind}.conf").read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} in {kind}.conf"
        text = text.replace(old, str(new))
    (folder / "tls").mkdir()
    shutil.copy(site.chain, folder / "tls/chain.pem")
    shutil.copy(site.key, folder / "tls/key.pem")
    path = folder / "nginx.conf"
    path.write_text(text)
    return path


def run_gateway(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`gateway ARGUMENTS` to its end."""
    return subprocess.run(
        [GATEWAY, *arguments], capture_output=True, text=True, timeout=LIMIT, check=False, cwd=folder,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


class ImportedGateway(Process):
    """What the migration guide says to do: import, check, run with a file for the process id.

    After `start` the warnings of the import are in `warnings`.
    """

    def __init__(self, configuration: Path) -> None:
        super().__init__(configuration.parent)
        self._configuration = configuration
        self.pid_file = self.folder / "gateway.pid"
        self.warnings: list[str] = []

    def start(self) -> ImportedGateway:
        """Import, check, and start it; it is ready when it says who it is."""
        imported = run_gateway(self.folder, "import-nginx", str(self._configuration))
        assert imported.returncode == 0, imported.stderr
        self.warnings = imported.stderr.splitlines()
        (self.folder / "mail.yaml").write_text(imported.stdout)
        checked = run_gateway(self.folder, "check", "mail.yaml")
        assert checked.returncode == 0, checked.stderr
        # A test run that is killed takes the gateway along.
        command = [
            require("setpriv"),
            "--pdeathsig",
            "TERM",
            "env",
            "-C",
            str(self.folder),
            GATEWAY,
            "run",
            "--no-supervisor",
            "mail.yaml",
        ]
        self.launch([*command, "--pid-file", str(self.pid_file)], self.pid_file.exists)
        assert int(self.pid_file.read_text()) == self.pid
        return self


@dataclass(frozen=True)
class Sender:
    """Somebody who sends from `source`, verifying certificates where there is TLS."""

    ca: Path
    source: str

    @contextmanager
    def connected(self, port: int, mode: Mode = "plain") -> Iterator[smtplib.SMTP]:
        """After EHLO, and STARTTLS where the mode says so."""
        context = ssl.create_default_context(cafile=str(self.ca))
        source = (self.source, 0)
        if mode == "tls":
            connection: smtplib.SMTP = smtplib.SMTP_SSL(
                "localhost", port, "client.test", timeout=LIMIT, source_address=source, context=context
            )
        else:
            connection = smtplib.SMTP("localhost", port, "client.test", LIMIT, source)
        with connection:
            if mode == "starttls":
                connection.starttls(context=context)
            connection.ehlo()
            yield connection

    def send(
        self, port: int, mode: Mode = "plain", user: User | None = None, recipient: str = "user@local.test"
    ) -> None:
        """One message, after a login if there is a user. Raises SMTPException."""
        with self.connected(port, mode) as connection:
            if user is not None:
                connection.login(user.name, user.password)
            connection.sendmail("a@x.test", recipient, f"Subject: {SUBJECT}\r\n\r\nhello\r\n".encode())


def fetch(place: Place, mode: Mode, user: User, source: str) -> bytes:
    """The first message by IMAP or POP3. Raises what imaplib and poplib raise for a refused login."""
    if place.protocol == "imap":
        with imap(place, mode, source) as reader:
            reader.login(user.name, user.password)
            return fetch_imap(reader)
    with pop3(place, mode, source) as popper:
        popper.user(user.name)
        popper.pass_(user.password)
        return b"\r\n".join((*popper.retr(1)[1], b""))


def at(site: StoreSite, protocol: Protocol, plain: int, tls: int = 0) -> Place:
    """A server's ports, as the clients want them."""
    return Place(protocol, plain, tls, site.ca)


def greeting(site: StoreSite, address: str, port: int) -> bytes:
    """What is said first there, in TLS."""
    context = ssl.create_default_context(cafile=str(site.ca))
    with (
        socket.create_connection((address, port), LIMIT) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        return connection.recv(1000)
