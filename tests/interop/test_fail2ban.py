"""docs/fail2ban: the filter finds every wrong password in the log, with the address it came from, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway import Attempt, Authenticated, Cause, Kind, Password, Refuse, Session, Stage
from gateway.observe import logs
from gateway.testing.gateway import running
from tests.fault.client import Client
from tests.interop.conftest import Records
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


async def logins(*credentials: tuple[str, str], helo: str = "client.test", before: str = "") -> list[str]:
    """Log in from CLIENT, each in a session of its own, and say `before` at its start: the replies to AUTH."""
    pipeline: dict[str, object] = {
        "relay": "open",
        "allow_plaintext_auth": True,
        "limits": {"auth_delay": "1ms"},
        "trust": {"xclient": [CLIENT]} if before else {},
        "stages": ["verify", "splice"],
        "upstreams": {"mta": {"servers": ["smtp://127.0.0.1:9"], "capabilities": {"assume": ["PIPELINING"]}}},
    }
    replies = []
    async with asyncio.timeout(20), running(pipeline, stages={"verify": Verify}) as gateway:
        for user, password in credentials:
            client = Client(*await asyncio.open_connection("127.0.0.1", gateway.port, local_addr=(CLIENT, 0)))
            assert (await client.reply()).startswith("220")
            for line in filter(None, (before, f"EHLO {helo}")):
                assert (await client.say(line))[0] == "2"
            response = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
            replies.append(await client.say(f"AUTH PLAIN {response}"))
            client.leave("close")
        await gateway.idle()
    return replies


def banned(records: Records) -> list[str]:
    """The addresses that fail2ban would count in this log, one for each line that matches."""
    run = subprocess.run(
        [require("fail2ban-regex"), "--out", "ip", str(records.path), str(FILTER)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "ERROR" not in run.stderr and run.returncode in (0, 255), run.stderr
    return run.stdout.split()


async def test_a_wrong_password_is_found_once(records: Records) -> None:
    replies = await logins(("tim", "wrong"), ("tim", "right"), ("alice", "right"))
    assert [reply[:3] for reply in replies] == ["535", "235", "235"]
    assert banned(records) == [CLIENT]


async def test_each_wrong_password_counts(records: Records) -> None:
    await logins(*[(f"user{number}", "wrong") for number in range(5)])
    assert banned(records) == [CLIENT] * 5


async def test_an_outage_bans_nobody(records: Records) -> None:
    (reply,) = await logins(("tim", "away"))
    assert reply.startswith("454 4.7.0")
    assert records.one("auth_failure")["client"] == CLIENT
    assert banned(records) == []


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7"])
async def test_the_client_behind_a_trusted_front_is_banned_and_not_the_front(address: str, records: Records) -> None:
    attribute = f"IPV6:{address}" if ":" in address else address
    await logins(("tim", "wrong"), before=f"XCLIENT ADDR={attribute}")
    assert banned(records) == [address]


VICTIM = "203.0.113.5"
RECORD = f'"record":"auth_failure","client":"{VICTIM}","cause":"authentication failed"'
CRAFTED = [
    f'"client":"{VICTIM}"',
    f'x","client":"{VICTIM}","y":"',
    f'x\\","client":"{VICTIM}","y":"\\',
    f'\\"client\\":\\"{VICTIM}\\",',
    f"{{{RECORD}}}",
    f"x\n{{{RECORD}}}\n",
    f"x\r\n{{{RECORD}}}\r\n",
    f"x\u2028{{{RECORD}}}",
    f'","time":"2000-01-01T00:00:00Z",{RECORD},"x":"',
    f"client={VICTIM} from {VICTIM} [{VICTIM}]",
]


@pytest.mark.parametrize("user", CRAFTED)
async def test_a_user_name_cannot_ban_somebody_else(user: str, records: Records) -> None:
    (reply,) = await logins((user, "wrong"))
    if not user.isprintable():
        assert reply.startswith("501")  # no name: no password was tried
        assert banned(records) == []
        return
    assert records.one("auth_failure")["user"] == user
    assert banned(records) == [CLIENT]


@pytest.mark.parametrize("user", CRAFTED)
async def test_a_user_name_cannot_ban_anybody_in_an_outage(user: str, records: Records) -> None:
    await logins((user, "away"))
    assert banned(records) == []


@pytest.mark.parametrize("user", ["tim", *(user for user in CRAFTED if user.isprintable()), 'x", cause: "authentication failed'])
async def test_in_the_text_form_too(user: str, records: Records) -> None:
    logs.configure("text", "info", file=str(records.path))
    await logins((user, "wrong"), (user, "away"), ("tim", "right"))
    assert "client login failed" in records.path.read_text()
    assert banned(records) == [CLIENT]


async def test_a_host_name_cannot_ban_anybody(records: Records) -> None:
    await logins(("tim", "right"), ("tim", "away"), helo=f"{{{RECORD}}}".replace(" ", ""))
    assert banned(records) == []
