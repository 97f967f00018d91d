"""Dovecot as Postfix's SASL server: nothing but its auth service, one user, every password mechanism; needs root."""

from __future__ import annotations

from pathlib import Path

from tests.peers.process import Process
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
        path = self.folder / "dovecot.conf"
        path.write_text(CONFIGURATION.format(folder=self.folder))
        self.launch([self._program, "-F", "-c", str(path)], self._socket.exists)
        return self
