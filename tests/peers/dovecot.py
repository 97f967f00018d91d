"""Dovecot as Postfix's SASL server (its auth service, every password mechanism), and as a mail store by LMTP; needs root."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.peers.process import Process, free_port, wait_for
from tests.peers.require import require, require_root

# Without the last two settings a failed login makes the next good one wait for seconds.
CONFIGURATION = """\
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/dovecot.log
protocols =
ssl = no
default_internal_user = dovecot
default_login_user = dovenull
auth_mechanisms = plain login cram-md5
disable_plaintext_auth = no
passdb {{
  driver = passwd-file
  args = {folder}/passwd
}}
service auth {{
  unix_listener {folder}/auth.sock {{
    mode = 0666
  }}
}}
auth_failure_delay = 0
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
"""


# A full mailbox is found out after the end of data, recipient by recipient.
STORE = """\
protocols = lmtp
listen = 127.0.0.1
mail_location = maildir:~/Maildir
mail_fsync = never
first_valid_uid = 1
mail_plugins = quota
plugin {{
  quota = count:User quota
  quota_vsizes = yes
}}
userdb {{
  driver = passwd-file
  args = {folder}/passwd
  default_fields = uid=mail gid=mail home={folder}/mail/%u
}}
namespace inbox {{
  inbox = yes
}}
service lmtp {{
  inet_listener lmtp {{
    port = {port}
  }}
  unix_listener {folder}/lmtp.sock {{
    mode = 0666
  }}
}}
"""


class Dovecot(Process):
    """Knows `users`, name to password. `main` is what a Postfix needs in its main.cf to ask it."""

    def __init__(self, folder: Path, users: dict[str, str]) -> None:
        require_root()
        super().__init__(folder)
        self._program = require("dovecot")
        self._socket = folder / "auth.sock"
        (folder / "passwd").write_text("".join(f"{name}:{{PLAIN}}{password}\n" for name, password in users.items()))
        self.main = (
            f"smtpd_sasl_auth_enable = yes\nsmtpd_sasl_type = dovecot\nsmtpd_sasl_path = {self._socket}\n"
            "smtpd_sasl_security_options = noanonymous\n"
        )

    def start(self) -> Dovecot:
        """Start it; Postfix must be started after it."""
        self._launch("", self._socket)
        return self

    def _launch(self, more: str, socket: Path) -> None:
        path = self.folder / "dovecot.conf"
        path.write_text(CONFIGURATION.format(folder=self.folder) + more)
        self.launch([self._program, "-F", "-c", str(path)], socket.exists)


class DovecotStore(Dovecot):
    """Takes mail for `users` by LMTP at `port` of 127.0.0.1 and at `socket`; the mailboxes of those in `full` are.

    `xclient`: loopback may say XCLIENT.
    """

    def __init__(
        self, folder: Path, users: Sequence[str], full: Sequence[str] = (), *, xclient: bool = False
    ) -> None:
        self._more = "login_trusted_networks = 127.0.0.0/8\n" if xclient else ""
        super().__init__(folder, {})
        require("/usr/lib/dovecot/lmtp")
        self.port, self.socket = free_port(), folder / "lmtp.sock"
        (folder / "mail").mkdir()
        shutil.chown(folder / "mail", "mail", "mail")
        rules = dict.fromkeys(users, "") | dict.fromkeys(full, "userdb_quota_rule=*:bytes=1")
        (folder / "passwd").write_text("".join(f"{name}:{{PLAIN}}x::::::{rule}\n" for name, rule in rules.items()))

    def start(self) -> DovecotStore:
        """Start it."""
        self._launch(STORE.format(folder=self.folder, port=self.port) + self._more, self.socket)
        return self

    def delivered(self, user: str) -> list[bytes]:
        """The messages in the user's mailbox, the oldest first."""
        new = self.folder / "mail" / user / "Maildir" / "new"
        files = sorted(new.iterdir(), key=lambda path: path.stat().st_mtime_ns) if new.exists() else []
        return [path.read_bytes() for path in files]

    def wait_log(self, text: str) -> None:
        """Wait for a text in its log."""
        wait_for(lambda: text in (self.folder / "dovecot.log").read_text(errors="replace"), text)
