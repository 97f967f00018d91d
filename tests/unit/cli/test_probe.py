"""`gateway probe`: what an administrator reads of each server, and the exit status for scripts."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

Command = Callable[..., Result]
Write = Callable[..., Path]
Serve = Callable[..., str]
OFFER = "XCLIENT NAME ADDR HELO"


def test_what_it_says_of_a_good_server(gateway: Command, write: Write, server: Serve) -> None:
    seen: list[str] = []
    address = server("SIZE 1000", OFFER, seen=seen, XCLIENT="220 mx.example ESMTP")
    write(stages="[xclient, splice]", upstreams=f"{{mta: {{servers: [{address}]}}}}")
    result = gateway("probe", "one.yaml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"one: upstream mta: smtp://{address}",
        "  greeting: 220 mx.example ESMTP",
        "  EHLO: SIZE 1000, XCLIENT NAME ADDR HELO",
        "  TLS: none (opportunistic)",
        "  XCLIENT: offered and believed",
    ]
    assert any(line.startswith("XCLIENT ") and "ADDR=192.0.2.1" in line for line in seen)
    assert not {line[:4].upper() for line in seen} & {"MAIL", "RCPT", "DATA", "BDAT"}, "it ends before DATA"


@pytest.mark.parametrize(
    ("stages", "keywords", "replies", "status", "said"),
    [
        ("[splice]", [], {}, 0, "XCLIENT: not offered, and not sent"),
        ("[splice]", [OFFER], {}, 0, "XCLIENT: offered; no stage of this pipeline sends it"),
        ("[xclient, splice]", [], {}, 1, "XCLIENT: NOT offered"),
        ("[xclient: continue, splice]", [], {}, 0, "XCLIENT: not offered; the session goes on without"),
        ("[xclient, splice]", [OFFER], {"XCLIENT": "550 5.7.0 no"}, 1, "XCLIENT: offered, but NOT believed"),
        ("[xclient, splice]", [OFFER], {"XCLIENT": "550 5.7.0 no"}, 1, "smtpd_authorized_xclient_hosts"),
        ("[xclient, splice]", [OFFER], {"XCLIENT": "554 5.7.1 go away"}, 1, "FAILED: 554 5.7.1 go away"),
        ("[upstream_auth: {user: a, password: swordfish}, splice]", [], {}, 1, "does not announce a mechanism that would do"),
        ("[upstream_auth: {user: a, password: swordfish}, splice]", ["AUTH PLAIN"], {"AUTH": "535 5.7.8 no"}, 1,
         "refused the login: 535 5.7.8 no"),
        ("[upstream_auth: {user: a, password: swordfish}, splice]", ["AUTH PLAIN"], {"AUTH": "235 2.7.0 ok"}, 0, ""),
    ],
)  # fmt: skip
def test_exit_status_and_reason(
    gateway: Command, write: Write, server: Serve,
    stages: str, keywords: list[str], replies: dict[str, str], status: int, said: str,
) -> None:  # fmt: skip
    write(stages=stages, upstreams=f"{{mta: {{servers: [{server(*keywords, **replies)}]}}}}")
    result = gateway("probe", "one.yaml")
    assert (result.exit_code, result.stderr) == (status, "")
    assert said in result.stdout and ("FAILED" in result.stdout) == bool(status)
    assert "swordfish" not in result.stdout


@pytest.fixture
def store() -> Iterator[Callable[..., str]]:
    """Serve IMAP or POP3: a greeting, then to each command the first of these answers whose word is in it, or OK."""
    servers: list[socketserver.ThreadingTCPServer] = []

    def serve(protocol: str, greeting: str, **answers: str) -> str:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.wfile.write(f"{greeting}\r\n".encode())
                for raw in self.rfile:
                    tag, line = raw.decode().split()[0], raw.decode()
                    ok = "+OK" if protocol == "pop3" else f"{tag} OK done"
                    answer = next((said for word, said in answers.items() if word in line), ok)
                    self.wfile.write(f"{answer.replace('TAG', tag)}\r\n".encode())

        made = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        made.daemon_threads = True
        servers.append(made)
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        return f"{protocol}://127.0.0.1:{made.server_address[1]}"

    yield serve
    for one in servers:
        one.shutdown()
        one.server_close()


CAPA = "+OK\r\nUSER\r\nSASL PLAIN\r\n."


@pytest.mark.parametrize(
    ("protocol", "greeting", "answers", "status", "said"),
    [
        ("imap", "* OK [CAPABILITY IMAP4rev1 ID] here", {}, 0,
         ["  greeting: [CAPABILITY IMAP4rev1 ID] here", "  CAPABILITY: IMAP4REV1, ID", "  TLS: none (opportunistic)",
          "  ID: offered and sent; only the server's log tells whether it is believed (rip=192.0.2.1)"]),
        ("imap", "* OK [CAPABILITY IMAP4rev1] here", {}, 1, ["  ID: NOT offered"]),
        ("pop3", "+OK [XCLIENT] here", {"CAPA": CAPA}, 0,
         ["  greeting: [XCLIENT] here", "  CAPA: USER, SASL PLAIN", "  XCLIENT: offered and believed"]),
        ("pop3", "+OK [XCLIENT] here", {"CAPA": CAPA, "XCLIENT": "+OK You are not from trusted IP"}, 1,
         ["  XCLIENT: offered, but NOT believed"]),
    ],
)  # fmt: skip
def test_mail_stores_are_asked_up_to_the_login(
    gateway: Command, write: Write, store: Callable[..., str],
    protocol: str, greeting: str, answers: dict[str, str], status: int, said: list[str],
) -> None:  # fmt: skip
    write(
        listen=f"['{protocol}://127.0.0.1:2599']", allow_plaintext_auth="true", stages="[auth_relay, xclient, splice]",
        relay="open", upstreams=f"{{box: {{servers: ['{store(protocol, greeting, **answers)}']}}}}",
    )  # fmt: skip
    result = gateway("probe", "one.yaml")
    assert (result.exit_code, result.stderr) == (status, "")
    assert [line for line in said if line not in result.stdout.splitlines()] == []
    assert ("FAILED" in result.stdout) == bool(status)


def test_a_file_without_upstreams_says_so(gateway: Command, write: Write) -> None:
    write(stages="[auth_http: 'http://127.0.0.1:1/', splice]", upstreams="{}", allow_plaintext_auth="true")
    result = gateway("probe", "one.yaml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "one: no upstreams in this file; a stage names the servers when there is a client\n"


def test_every_server_is_asked_whatever_the_first_one_says(gateway: Command, write: Write, server: Serve) -> None:
    good = server()
    write(upstreams=f"{{mta: {{servers: [smtp://127.0.0.1:1]}}, other: {{servers: [{good}]}}}}", stages="[splice: mta]")
    result = gateway("probe", "one.yaml")
    assert result.exit_code == 1
    assert "  FAILED: cannot connect: Connection refused" in result.stdout
    assert f"one: upstream other: smtp://{good}" in result.stdout and "220 mx.example" in result.stdout


def test_embedded_servers_are_left_out(gateway: Command, write: Write) -> None:
    write(upstreams="{mta: {servers: [embedded://mail]}}")
    result = gateway("probe", "one.yaml")
    assert result.exit_code == 0
    assert result.stdout == "embedded servers run inside `gateway run`; they are left out\n"


def test_a_wrong_file_is_status_2(gateway: Command, write: Write) -> None:
    write(stages="[splise]")
    result = gateway("probe", "one.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "did you mean 'splice'?" in result.stderr
