"""Dovecot 2.3 as a mail store: IMAP and POP3 in clear text, with STARTTLS, with implicit TLS, and behind a PROXY header.

    with scratch() as folder, MailStore(folder, chain, key) as store:
        user = store.user()                     # a mailbox of its own for each test
        store.put(user, message)
        ...                                     # store.imap.plain, store.pop3.tls
        store.wait_log(rf"imap-login: .*Login: user=<{user.name}>.* rip=192.0.2.7,")

It offers every password mechanism, and tokens that its own token server knows; its auth socket serves a Postfix as
well (`store.main`). Loopback may say who the client is. Needs root.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from tests.peers.process import LIMIT, Process, free_port, wait_for
from tests.peers.require import require, require_root

MASTER_USER, MASTER_PASSWORD = "operator", "master word"
DOMAINS = ("example.org", "example.net")
USERS = 100
"""Mailboxes of each domain; every test takes its own, since Dovecot looks at its list of users once a second only."""

# Failed logins wait for nothing but Dovecot's own tick of half a second; all mail is one uid's, who may have 128 inotify
# instances at most: beyond that IDLE looks at mailboxes once a second, by the setting below.
CONFIGURATION = """\
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/dovecot.log
instance_name = {name}
protocols = imap pop3
listen = 127.0.0.1
ssl = yes
ssl_cert = <{chain}
ssl_key = <{key}
default_internal_user = dovecot
default_internal_group = dovecot
default_login_user = dovenull
disable_plaintext_auth = no
auth_mechanisms = plain login cram-md5 scram-sha-256 apop xoauth2 oauthbearer
auth_failure_delay = 0
auth_verbose = yes
auth_username_chars =
auth_master_user_separator = *
login_trusted_networks = {trusted}
haproxy_trusted_networks = 127.0.0.0/8
login_greeting = {name} ready.
login_log_format_elements = user=<%u> method=%m rip=%r rport=%b lip=%l lport=%a mpid=%e %c session=<%{{session}}>
mail_max_userip_connections = 0
mail_fsync = never
mailbox_idle_check_interval = 1 secs
first_valid_uid = 1
mail_location = maildir:~/Maildir
passdb {{
  driver = passwd-file
  master = yes
  args = scheme=PLAIN {folder}/masters
}}
passdb {{
  driver = oauth2
  mechanisms = xoauth2 oauthbearer
  args = {folder}/oauth2.conf
}}
passdb {{
  driver = passwd-file
  mechanisms = plain login cram-md5 scram-sha-256 apop none
  args = scheme=PLAIN username_format=%u {folder}/users
}}
userdb {{
  driver = static
  args = uid=mail gid=mail home={folder}/mail/%u
}}
namespace inbox {{
  inbox = yes
}}
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service auth {{
  unix_listener {folder}/auth.sock {{
    mode = 0666
  }}
}}
"""

LOGIN_SERVICE = """\
service {protocol}-login {{
  inet_listener {protocol} {{
    port = {plain}
  }}
  inet_listener {protocol}s {{
    port = {tls}
    ssl = yes
  }}
  inet_listener {protocol}_haproxy {{
    port = {proxied}
    haproxy = yes
  }}
  service_count = 0
}}
"""

TOKENS = """\
introspection_url = http://127.0.0.1:{port}/introspect
introspection_mode = post
username_attribute = username
active_attribute = active
active_value = true
timeout_msecs = 5000
"""


@dataclass(frozen=True)
class User:
    """A mailbox, what opens it, and a token that does so too."""

    name: str
    password: str
    token: str = ""


@dataclass(frozen=True)
class Ports:
    """Of one protocol: clear text and STARTTLS, implicit TLS, and behind a PROXY header."""

    plain: int = field(default_factory=free_port)
    tls: int = field(default_factory=free_port)
    proxied: int = field(default_factory=free_port)


class TokenServer:
    """Tells Dovecot whose token it is (RFC 7662), in a thread. `tokens`: token to user name."""

    def __init__(self, tokens: dict[str, str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
                user = tokens.get(form.get("token", [""])[0])
                body = json.dumps({"active": "true", "username": user} if user else {"active": "false"}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing on standard error."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def start(self) -> TokenServer:
        """Begin to answer."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class MailStore(Process):
    """One instance. `imap` and `pop3` are its ports; `name` stands in its greetings; `more` is appended.

    `umlaut` is somebody whose name and password are not ASCII.

    `trusted`: networks that may say who the client is, by IMAP ID or POP3 XCLIENT.
    """

    def __init__(
        self, folder: Path, chain: Path, key: Path, *, name: str = "store", trusted: str = "127.0.0.0/8", more: str = ""
    ) -> None:
        require_root()
        super().__init__(folder)
        self._program = require("dovecot")
        for protocol in ("imap", "pop3"):
            require(f"/usr/lib/dovecot/{protocol}-login")
        self.name = name
        self.imap, self.pop3 = Ports(), Ports()
        self._settings = {"chain": chain, "key": key, "trusted": trusted, "name": name}
        self._more = more
        everybody = [
            User(f"user{i}@{domain}", f'pass "{i}\\ word', f"token-{i}-{domain}")
            for domain in DOMAINS
            for i in range(USERS)
        ]
        self._free = {domain: iter([user for user in everybody if user.name.endswith(domain)]) for domain in DOMAINS}
        self.umlaut = User("jürgen@example.org", 'pä"ss\\wört', "token-umlaut")
        everybody.append(self.umlaut)
        self._tokens = {user.token: user.name for user in everybody}
        self._token_server: TokenServer | None = None
        self._numbers = itertools.count()
        # Fields of these files end at a colon.
        lines = (f"{user.name}:{{PLAIN}}{user.password}\n" for user in everybody)
        (folder / "users").write_text("".join(lines), encoding="utf-8")
        (folder / "masters").write_text(f"{MASTER_USER}:{{PLAIN}}{MASTER_PASSWORD}\n")
        (folder / "mail").mkdir()
        shutil.chown(folder / "mail", "mail", "mail")
        self.main = (
            f"smtpd_sasl_auth_enable = yes\nsmtpd_sasl_type = dovecot\nsmtpd_sasl_path = {folder}/auth.sock\n"
            "smtpd_sasl_security_options = noanonymous\nbroken_sasl_auth_clients = no\n"
        )

    def start(self) -> MailStore:
        """Start it; after this it accepts connections."""
        self._token_server = TokenServer(self._tokens).start()
        (self.folder / "oauth2.conf").write_text(TOKENS.format(port=self._token_server.port))
        text = CONFIGURATION.format(folder=self.folder, **self._settings)
        for protocol, ports in (("imap", self.imap), ("pop3", self.pop3)):
            text += LOGIN_SERVICE.format(protocol=protocol, **vars(ports))
        path = self.folder / "dovecot.conf"
        path.write_text(text + self._more)
        self.launch([self._program, "-F", "-c", str(path)], lambda: " starting up for " in self.log())
        return self

    def stop(self, number: int = signal.SIGTERM, limit: float = LIMIT) -> int | None:
        """As for every process; and its token server."""
        if self._token_server is not None:
            self._token_server.stop()
            self._token_server = None
        return super().stop(number, limit)

    def user(self, domain: str = DOMAINS[0]) -> User:
        """Somebody whom no other test has; all instances know the same people."""
        return next(self._free[domain])

    def put(self, user: User, message: bytes) -> None:
        """A message (lines end in CRLF) into the user's inbox; the first one is the oldest."""
        new = self.folder / "mail" / user.name / "Maildir" / "new"
        if not new.exists():
            for folder in (new, new.with_name("cur"), new.with_name("tmp")):
                folder.mkdir(parents=True)
            for folder in (new.parent.parent, new.parent, new, new.with_name("cur"), new.with_name("tmp")):
                shutil.chown(folder, "mail", "mail")
        number = next(self._numbers)
        path = new.with_name("tmp") / f"{1_700_000_000 + number}.{number}.test"
        path.write_bytes(message.replace(b"\r\n", b"\n"))
        shutil.chown(path, "mail", "mail")
        path.rename(new / path.name)

    def stored(self, user: User) -> list[bytes]:
        """The messages in the user's inbox with lines that end in CRLF, the oldest first."""
        maildir = self.folder / "mail" / user.name / "Maildir"
        files = [path for name in ("new", "cur") if (maildir / name).exists() for path in (maildir / name).iterdir()]
        return [path.read_bytes().replace(b"\n", b"\r\n") for path in sorted(files, key=lambda path: path.name)]

    def log(self) -> str:
        """What it logged."""
        path = self.folder / "dovecot.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_log(self, pattern: str, limit: float = LIMIT) -> re.Match[str]:
        """Wait for a line that matches: the first such match."""
        try:
            wait_for(lambda: re.search(pattern, self.log(), re.MULTILINE), pattern, limit)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log()[-3000:]}") from None
        match = re.search(pattern, self.log(), re.MULTILINE)
        assert match is not None
        return match

    def wait_login(self, protocol: str, user: User) -> dict[str, str]:
        """Wait until the user's first login is logged: `method`, `rip` (client), `rport`, `lip`, `lport`, `mpid`, ..."""
        line = self.wait_log(rf"{protocol}-login: Info: Login: (user=<{re.escape(user.name)}>, .*)$")[1]
        # `TLS` or `secured` stand among the elements without a value.
        elements = (element.partition("=") for element in line.split(", "))
        return {name: value.strip("<>") for name, _, value in elements}

    def kill_session(self, mpid: str) -> None:
        """End the mail process that has a session, by `mpid` of its login."""
        os.kill(int(mpid), signal.SIGKILL)
