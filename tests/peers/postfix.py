"""A private Postfix: own configuration, queue and log in one folder, on a loopback port; needs root.

    with scratch() as folder, Postfix(folder, main="smtpd_authorized_xclient_hosts = 127.0.0.1") as postfix:
        ...                                     # postfix.port
        postfix.wait_log(r": removed")

`user@local.test` is delivered to a Maildir (`postfix.delivered()`), other domains are relayed for 127.0.0.1 only.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import subprocess
import time
from pathlib import Path

from tests.peers.process import LIMIT, Process, free_port, wait_for
from tests.peers.require import require, require_root

MASTER = """\
127.0.0.1:{port} inet n - n - - smtpd {smtpd_options}
pickup    unix  n - n 60    1 pickup
cleanup   unix  n - n -     0 cleanup
qmgr      unix  n - n 300   1 qmgr
rewrite   unix  - - n -     - trivial-rewrite
bounce    unix  - - n -     0 bounce
defer     unix  - - n -     0 bounce
trace     unix  - - n -     0 bounce
proxymap  unix  - - n -     - proxymap
anvil     unix  - - n -     1 anvil
smtp      unix  - - n -     - smtp
lmtp      unix  - - n -     - lmtp
error     unix  - - n -     - error
retry     unix  - - n -     - error
discard   unix  - - n -     - discard
virtual   unix  - n n -     - virtual
showq     unix  n - n -     - showq
tlsmgr    unix  - - n 1000? 1 tlsmgr
scache    unix  - - n -     1 scache
postlog   unix-dgram n - n - 1 postlogd
"""

# No name is looked up anywhere; the log is a file, since there is no syslog.
MAIN = """\
compatibility_level = 3.6
queue_directory = {folder}/spool
data_directory = {folder}/data
maillog_file = {folder}/maillog
maillog_file_prefixes = {folder}
myhostname = mx.test
mydomain = test
mydestination =
alias_maps =
alias_database =
local_recipient_maps =
mynetworks = 127.0.0.1/32
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
smtpd_client_connection_count_limit = 0
disable_dns_lookups = yes
smtp_host_lookup = native
smtpd_peername_lookup = no
virtual_mailbox_domains = local.test
virtual_mailbox_base = {folder}/mail
virtual_mailbox_maps = inline:{{user@local.test=user/, other@local.test=other/}}
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{gid}
virtual_minimum_uid = 1
"""

QUEUES = ("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "private", "saved", "trace")


class Postfix(Process):
    """One instance. `main` is appended to main.cf, `master` to master.cf, `smtpd_options` are `-o name=value`."""

    def __init__(
        self, folder: Path, *, main: str = "", master: str = "", smtpd_options: str = "", port: int | None = None
    ) -> None:
        require_root()
        super().__init__(folder)
        self._master = require("/usr/lib/postfix/sbin/master")
        self.port = port or free_port()
        self.configuration = folder / "etc"
        self._main, self._services, self._smtpd_options = main, master, smtpd_options
        self._mark = 0

    def start(self) -> Postfix:
        """Start it; after this it accepts connections."""
        self._write()
        self._mark = len(self._whole_log())
        try:
            self.launch([self._master, "-c", str(self.configuration), "-d"], lambda: "daemon started" in self.log())
        except RuntimeError as error:  # the master complains about its files to syslog only
            check = subprocess.run(
                [require("postconf"), "-c", str(self.configuration), "-M"], capture_output=True, text=True, check=False
            )
            raise RuntimeError(f"{error}\n{check.stderr}\n{self.log()}") from None
        return self

    def configure(self, main: str) -> None:
        """Replace what was appended to main.cf and make the running instance read it, as `postfix reload` does."""
        self._main = main
        self._write()
        reloads = self.log().count("reload -- version")
        os.kill(self.pid, 1)  # SIGHUP
        wait_for(lambda: self.log().count("reload -- version") > reloads, "Postfix's reload")

    def log(self) -> str:
        """What it logged since its start."""
        return self._whole_log()[self._mark :]

    def wait_log(self, pattern: str, limit: float = LIMIT) -> re.Match[str]:
        """Wait for a line that matches `pattern`: the first such match since the start."""
        try:
            wait_for(lambda: re.search(pattern, self.log(), re.MULTILINE), pattern, limit)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log()}") from None
        match = re.search(pattern, self.log(), re.MULTILINE)
        assert match is not None
        return match

    def delivered(self, mailbox: str = "user") -> list[bytes]:
        """The messages in a mailbox, the oldest first."""
        new = self.folder / "mail" / mailbox / "new"
        files = sorted(new.iterdir(), key=lambda path: path.stat().st_mtime_ns) if new.exists() else []
        return [path.read_bytes() for path in files]

    def _whole_log(self) -> str:
        path = self.folder / "maillog"
        return path.read_text(errors="replace") if path.exists() else ""

    def _write(self) -> None:
        nobody = pwd.getpwnam("nobody")
        for name in ("etc", "spool", "data", "mail"):
            (self.folder / name).mkdir(exist_ok=True)
        shutil.chown(self.folder / "data", "postfix", "root")
        os.chown(self.folder / "mail", nobody.pw_uid, nobody.pw_gid)
        main = MAIN.format(folder=self.folder, uid=nobody.pw_uid, gid=nobody.pw_gid)
        master = MASTER.format(port=self.port, smtpd_options=self._smtpd_options)
        (self.configuration / "dynamicmaps.cf").write_text("")
        (self.configuration / "main.cf").write_text(f"{main}{self._main}\n")
        (self.configuration / "master.cf").write_text(f"{master}{self._services}\n")
        old = time.time() - 60
        for path in self.configuration.iterdir():
            os.utime(path, (old, old))  # each program naps until its configuration is two seconds old
        self._make_queue()

    def _make_queue(self) -> None:
        user, group = pwd.getpwnam("postfix").pw_uid, grp.getgrnam("postdrop").gr_gid
        folders = [(name, 0, 0o700) for name in QUEUES] + [("maildrop", group, 0o1730), ("public", group, 0o2710)]
        for name, owner_group, mode in folders:
            path = self.folder / "spool" / name
            path.mkdir(exist_ok=True)
            os.chown(path, user, owner_group)
            path.chmod(mode)
        (self.folder / "spool" / "pid").mkdir(exist_ok=True)
