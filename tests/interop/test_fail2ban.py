"""docs/fail2ban: the filter finds every wrong password in the log, with the address it came from, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway import Attempt, Authenticated, Cause, Kind, Password, Refuse, Session, Stage
from gateway.testing.gateway import running
from tests.peers.require import require

pytestmark = [pytest.mark.peers, pytest.mark.anyio]

FILTER = Path(__file__).parents[2] / "docs" / "fail2ban" / "filter.d" / "mail-gateway.conf"
CLIENT = "127.0.0.9"


class Verify(Stage):
    """`right` is everybody's password, and with `away` nobody can tell."""

    kind = Kind.GUARD
    decides_identity = True
    never_pass = True

    def mechanisms(self, session: Session) -> Sequence[str]:
        return ("PLAIN",)

    def auth(self, session: Session, attempt: Attempt) -> Refuse | Authenticated:
        given = attempt.credentials
        assert isinstance(given, Password)
        if given.password == "away":
            raise ConnectionRefusedError("the verifier is gone")
        return Authenticated(given.user) if given.password == "right" else Refuse(Cause.AUTH_FAILED)


async def logins(*credentials: tuple[str, str], helo: str = "client.test") -> list[str]:
    """Log in from CLIENT, each in a session of its own: the replies."""
    pipeline: dict[str, object] = {
        "allow_plaintext_auth": True,
        "limits": {"auth_delay": "1ms"},
        "stages": ["verify", "splice"],
        "upstreams": {"mta": {"servers": ["smtp://127.0.0.1:9"], "capabilities": {"assume": ["PIPELINING"]}}},
    }
    replies = []
    async with running(pipeline, stages={"verify": Verify}) as gateway:
        for user, password in credentials:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, local_addr=(CLIENT, 0))
            await reader.readline()
            writer.write(f"HELO {helo}\r\nRSET\r\nEHLO {helo}\r\n".encode())
            while (await reader.readline())[3:4] == b"-" or not reader.at_eof():
                if (line := await reader.readline()).startswith(b"250 ") and b"ize" not in line:
                    break
            response = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
            writer.write(f"AUTH PLAIN {response}\r\n".encode())
            replies.append((await reader.readline()).decode())
            writer.close()
        await gateway.idle()
    return replies


def found(log: Path) -> list[str]:
    """The addresses that fail2ban would count in this log, one for each line that matches."""
    run = subprocess.run(
        [require("fail2ban-regex"), "--out", "ip", str(log), str(FILTER)], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert "rror" not in run.stderr, run.stderr
    return re.findall(r"^[0-9a-f.:]+$", run.stdout, re.MULTILINE)
