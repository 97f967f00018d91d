"""Postfix's test ends: smtp-sink, a server that takes everything, and smtp-source, a client that sends a lot."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.peers.process import LIMIT, Process, free_port, port_open, wait_for
from tests.peers.require import require


class SmtpSink(Process):
    """`smtp-sink` on a loopback port.

    `options` are its own (`["-f", "RCPT"]` refuses recipients, `["-Q", "DATA"]` closes at DATA, `["-L"]` is LMTP).
    It announces no SIZE and no STARTTLS, ends EHLO with an empty line, and answers XCLIENT with 250: it is no judge of
    XCLIENT or AUTH. With `dump` it keeps each message, whose first lines are X-Client-Addr, X-Mail-Args and the like.
    """

    def __init__(
        self, folder: Path, options: Sequence[str] = (), *, dump: bool = True, port: int | None = None
    ) -> None:
        super().__init__(folder)
        self._program = require("smtp-sink")
        self._options = list(options)
        self._dump = folder / "dump" if dump else None
        self.port = port or free_port()

    def start(self) -> SmtpSink:
        """Start it; the look whether it listens is one session to it."""
        command = [self._program, *self._options]
        if self._dump is not None:
            self._dump.mkdir(exist_ok=True)
            command += ["-d", f"{self._dump}/m."]
        if os.geteuid() == 0:
            command += ["-u", "nobody"]
            if self._dump is not None:
                os.chown(self._dump, pwd.getpwnam("nobody").pw_uid, -1)
        self.launch([*command, f"127.0.0.1:{self.port}", "64"], port_open(self.port))
        return self

    def messages(self) -> list[bytes]:
        """What it was given so far, the oldest first."""
        assert self._dump is not None, "dump=False"
        return [path.read_bytes() for path in sorted(self._dump.iterdir(), key=lambda path: path.stat().st_mtime_ns)]

    def wait_messages(self, count: int, limit: float = LIMIT) -> list[bytes]:
        """Wait until it was given `count` messages."""
        wait_for(lambda: len(self.messages()) >= count, f"{count} messages at smtp-sink", limit)
        return self.messages()


def smtp_source(port: int, options: Sequence[str] = (), *, limit: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run `smtp-source` against a loopback port; status 0 if every message went through.

    `options`: `["-s", "3", "-m", "6", "-l", "1000"]` are 3 sessions at a time, 6 messages, 1000 octets each. It says
    HELO and waits for every reply.
    """
    command = [require("smtp-source"), "-f", "a@x.test", "-t", "user@local.test", *options, f"127.0.0.1:{port}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
