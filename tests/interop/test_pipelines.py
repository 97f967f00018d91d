"""The files of pipelines/ as they stand: `gateway run` with the peers that each names, and mail through it.

For mx.yaml see test_mx.py.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.interop.conftest import Authority
from tests.interop.gateway_process import GatewayProcess, installation
from tests.interop.postfix_upstream import AUTHORIZED
from tests.peers.clients import Swaks, burst, swaks
from tests.peers.postfix import Postfix
from tests.peers.process import Process, free_port, scratch, wait_for

pytestmark = pytest.mark.peers

STARTTLS_PORT, TLS_PORT = PORTS = 2587, 2465
DEMO = ("--auth-user", "demo@example.org", "--auth-password", "demo")


@pytest.fixture
def folder(authority: Authority) -> Iterator[Path]:
    """The shipped pipelines in a folder of their own."""
    with scratch("gateway-") as path:
        yield installation(path, authority.issue("gateway.example.org", "localhost", "127.0.0.1"))


def received(folder: Path, count: int) -> list[str]:
    """Wait until the embedded upstream stored this many messages below var/mail."""
    new = folder / "var/mail/new"
    wait_for(lambda: len(list(new.iterdir())) >= count, f"{count} messages in {new}")
    return [path.read_text() for path in sorted(new.iterdir(), key=lambda path: path.stat().st_mtime_ns)]


def delivered(postfix: Postfix, count: int) -> list[bytes]:
    """Wait until this Postfix delivered so many messages."""
    wait_for(lambda: len(postfix.delivered()) >= count, f"{count} messages")
    return postfix.delivered()


class AuthServer(Process):
    """examples/auth_server.py."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder)
        self.port = free_port()
        self._options = options

    def start(self) -> AuthServer:
        """Start it and wait until it says where it listens."""
        program = str(Path(__file__).parents[2] / "examples/auth_server.py")
        command = [sys.executable, program, "--listen", f"127.0.0.1:{self.port}", *self._options]
        self.launch(command, lambda: "auth server: http" in self.said())
        return self


# -- submission -----------------------------------------------------------------------------------------------


def submission_serves(gateway: GatewayProcess) -> None:
    """What both submission pipelines promise: TLS, a login, and mail below var/mail that says who sent it."""
    for count, (mode, port) in enumerate((("--tls", STARTTLS_PORT), ("--tlsc", TLS_PORT)), 1):
        for mechanism in ("PLAIN", "LOGIN"):
            run = swaks(port, mode, "--auth", mechanism, *DEMO, "--from", "a@example.org", to="b@example.org")
            assert run.status == 0, run.transcript
            assert "250 2.0.0 Ok: queued as" in run.transcript
        *_, mail = received(gateway.folder, 2 * count)
        for field in ("Return-Path: <a@example.org>", "Delivered-To: b@example.org", "X-Client-Addr: 127.0.0.1",
                      "X-Client-Login: demo@example.org", "X-Client-Helo: client.test"):  # fmt: skip
            assert f"{field}\n" in mail
    run = swaks(TLS_PORT, "--tlsc")
    assert run.last.startswith("530 5.7.0"), run.transcript
    run = swaks(STARTTLS_PORT, "--auth-optional", "PLAIN", *DEMO)
    assert run.last.startswith("530 5.7.0"), run.transcript
    run = swaks(TLS_PORT, "--tlsc", "--auth", "PLAIN", "--auth-user", "demo@example.org", "--auth-password", "wrong")
    assert run.status == 28, run.transcript
    assert any(reply.startswith("535 5.7.") for reply in run.replies), run.transcript
    assert burst(STARTTLS_PORT, b"EHLO early.test\r\n").startswith(b"554 5.")  # before the greeting
    assert len(received(gateway.folder, 4)) == 4


def test_submission(folder: Path) -> None:
    with GatewayProcess(folder, "pipelines/submission.yaml", ports=PORTS) as gateway:
        submission_serves(gateway)
        assert gateway.stop(signal.SIGTERM) == 0
        assert len(gateway.records("transaction")) == 4
        assert len(gateway.records("stop")) == 1


def test_submission_http(folder: Path) -> None:
    auth = AuthServer(folder, "--upstream", "pool:mailbox", "--key", "demo")
    variables = {"AUTH_URL": f"http://127.0.0.1:{auth.port}/auth"}
    with auth, GatewayProcess(folder, "pipelines/submission-http.yaml", ports=PORTS, variables=variables) as gateway:
        submission_serves(gateway)
        auth.stop()
        run = swaks(TLS_PORT, "--tlsc", "--auth", "PLAIN", *DEMO)
        assert run.status == 28, run.transcript
        assert any(reply.startswith("454 4.7.0") for reply in run.replies), run.transcript
        assert gateway.stop() == 0


def test_submission_http_with_another_key(folder: Path) -> None:
    """The auth server then says 451 to every login: nobody is told that the password was wrong."""
    auth = AuthServer(folder, "--upstream", "pool:mailbox", "--key", "other")
    variables = {"AUTH_URL": f"http://127.0.0.1:{auth.port}/auth"}
    with auth, GatewayProcess(folder, "pipelines/submission-http.yaml", ports=PORTS, variables=variables):
        run = swaks(TLS_PORT, "--tlsc", "--auth", "PLAIN", *DEMO)
        assert run.status == 28, run.transcript
        assert any(reply.startswith("451 4.3.0") for reply in run.replies), run.transcript


# -- smarthost ------------------------------------------------------------------------------------------------

CAROL, ALICE, LETTER = "carol@example.org", "alice@example.org", "letter@news.example.org"


def test_smarthost(folder: Path) -> None:
    """Paid and free users land on different servers, the newsletter's domain on a third; a dead server is passed."""
    names = ("PAID_1", "PAID_2", "FREE", "BULK")
    with ExitStack() as stack:
        postfix = {
            name: stack.enter_context(Postfix(stack.enter_context(scratch()), main=AUTHORIZED)) for name in names
        }
        variables = {name: f"127.0.0.1:{one.port}" for name, one in postfix.items()}
        port = free_port()
        variables["SMARTHOST_LISTEN"] = f"127.0.0.1:{port}"
        gateway = stack.enter_context(GatewayProcess(folder, "pipelines/smarthost.yaml", variables=variables))

        def send(user: str, sender: str = "") -> Swaks:
            password = user.partition("@")[0]
            login = ("--auth", "PLAIN", "--auth-user", user, "--auth-password", password)
            return swaks(port, "--tls", *login, "--from", sender or user)

        def counts() -> dict[str, int]:
            return {name: len(one.delivered()) for name, one in postfix.items()}

        assert send(CAROL).status == 0
        delivered(postfix["FREE"], 1)
        assert send(ALICE).status == 0
        delivered(postfix["PAID_2"], 1)
        assert counts() == {"PAID_1": 0, "PAID_2": 1, "FREE": 1, "BULK": 0}
        postfix["PAID_2"].wait_log(f"sasl_username={ALICE}")
        assert send(LETTER).status == 0
        delivered(postfix["BULK"], 1)
        postfix["PAID_2"].stop()
        assert send(ALICE).status == 0
        delivered(postfix["PAID_1"], 1)
        run = send(CAROL, ALICE)
        assert any(reply.startswith("553 5.7.1") for reply in run.replies), run.transcript
        assert counts() == {"PAID_1": 1, "PAID_2": 1, "FREE": 1, "BULK": 1}
        assert gateway.stop() == 0
        assert [record["user"] for record in gateway.records("transaction")] == [CAROL, ALICE, LETTER, ALICE]
