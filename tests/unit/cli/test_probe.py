"""`gateway probe`: what an administrator reads of each server, and the exit status for scripts."""

from __future__ import annotations

from collections.abc import Callable
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
