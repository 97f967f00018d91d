"""`gateway ctl` against the real admin API over a made-up service."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from gateway.admin.api import application
from gateway.admin.place import bound
from gateway.cli import ctl, ctl_client, ctl_tables, main
from gateway.observe import logs
from tests.unit.admin.conftest import FakeHub

Ctl = Callable[..., Result]


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub(workers=((2, 0),))


def served(hub: FakeHub, address: str, token: str | None = None) -> Iterator[str]:
    """The API in a thread of its own; where it listens."""
    logs.configure("json", "critical")  # the API logs what it is told
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(application(hub, None, token), access_log=None)
    sock = bound(address)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.SockSite(runner, sock).start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield address if address.startswith("unix:") else f"http://127.0.0.1:{sock.getsockname()[1]}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    logs.close()


@pytest.fixture
def run(hub: FakeHub, tmp_path: Path) -> Iterator[Ctl]:
    """Run `gateway ctl ARGUMENTS` at the socket."""
    path = tmp_path / "admin.sock"
    for _ in served(hub, f"unix:{path}"):
        yield lambda *arguments: CliRunner().invoke(main, ["ctl", "--socket", str(path), *arguments])


STATUS = {
    "pid": 7, "started": 1.0, "generation": 2, "state": "serving", "reason": "the last reload failed\nat 3", "restarts": 1,
    "workers": [{"generation": 2, "worker": number, "pid": 8, "started": 1.0, "state": "serving"} for number in (0, 1)],
}  # fmt: skip
STATS = {"pid": 8, "sessions": 3, "states": {"joined": 3}, "pipelines": {"mx": 3}, "cpu": 90.0, "memory": 40 << 20,
         "descriptors": 17}  # fmt: skip
SESSION = {
    "id": "7KQ2-M9X", "pipeline": "mx", "listener": "smtp://:25", "client": "[2001:db8::1]:4711", "name": "",
    "protocol": "smtp", "tls": "TLSv1.3", "user": "kim\x1b[31m", "helo": "", "state": "command", "upstream": "",
    "seconds": 125.0, "bytes_in": 1536, "bytes_out": 12, "transactions": 1,
}  # fmt: skip
SESSIONS = {"total": 3, "matched": 1, "sessions": [SESSION]}
WHOLE = {
    **SESSION, "peer": "192.0.2.1:1", "refusals": 0, "errors": 0, "facts": {"helo.name": "mail", "tls.active": True},
    "transaction": {"id": "T", "sender": "a@b.c", "size": 0, "recipients": [{"address": "d@e.f", "reply": "250 Ok"}],
                    "refused": []},
    "verdicts": [{"stage": "access", "phase": "connect", "verdict": "pass", "mode": "enforce"}],
    "stage_ms": {"access": 0.25}, "log": [{"time": "T1", "level": "info", "record": "auth", "mechanism": "PLAIN"}],
}  # fmt: skip
SERVER = {"url": "smtp://a:25", "state": "down", "weight": 3, "share": 0.5, "active": 1, "idle": 0, "total": 4,
          "latency_ms": None, "last_error": "refused"}  # fmt: skip
POOLS = [{"pipeline": "mx", "name": "mta", "waiting": 0, "servers": [SERVER]}]
BAN = {"network": "192.0.2.1", "pipeline": "mx", "stage": "ban", "seconds": 90.0, "until": 0, "level": 2, "by": "stage",
       "reason": "x"}  # fmt: skip
LIMIT = {"key": "rate:mx:r:k", "kind": "rate", "count": 2.5, "size": 0, "expires": None}
CERT = {"chain": "/c.pem", "names": ["a", "b"], "issuer": "CN=x", "not_after": 0.0, "listeners": ["smtps://:465"]}

LOOKING = [
    # arguments, operation, its answer, arguments of it, words of each line that must be there
    (["sessions", "--user", "kim", "--limit", "7"], "sessions", SESSIONS, {"user": "kim", "limit": "7"}, [
        "ID PIPELINE CLIENT USER PROTOCOL TLS STATE UPSTREAM SECONDS IN OUT MESSAGES WORKER",
        r"7KQ2-M9X mx [2001:db8::1]:4711 kim\x1b[31m smtp TLSv1.3 command - 2m05s 1.5K 12 1 2.0",
        "1 of 1 that match, 3 in all",
    ]),
    (["sessions"], "sessions", {"total": 0, "matched": 0, "sessions": []}, {"limit": "100"}, ["no sessions"]),
    (["session", "7KQ2-M9X"], "session", WHOLE, {"id": "7KQ2-M9X"}, [
        "FACT VALUE", "tls.active yes", "recipient d@e.f 250 Ok", "access connect pass enforce", "access 0.25",
        "T1 info auth mechanism=PLAIN",
    ]),
    (["upstreams"], "upstreams", POOLS, {}, [
        "PIPELINE POOL SERVER STATE WEIGHT OF WEIGHT ACTIVE IDLE WAITING MS LAST ERROR",
        "mx mta smtp://a:25 down 3 50% 4 0 0 - refused",
    ]),
    (["limits", "show", "rate:"], "limits", [LIMIT], {"prefix": "rate:"}, ["rate:mx:r:k rate 2.5 -"]),
    (["limits", "show"], "limits", [{**LIMIT, "key": "ban:k", "kind": "value", "count": 0}] * 1000, {}, [
        "ban:k value - -", "the first 1000; a PREFIX shows others",
    ]),
    (["bans"], "bans", [BAN], {}, ["192.0.2.1 mx ban 1m30s 1970-01-01 00:00:00Z 2 stage x"]),
    (["bans", "list"], "bans", [], {}, ["nobody is banned"]),
    (["certs"], "certs", [CERT], {}, ["NAMES FILE EXPIRES DAYS ISSUER LISTENERS"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "op", "answer", "args", "expected"), LOOKING)
def test_looking(
    hub: FakeHub, run: Ctl, arguments: list[str], op: str, answer: Any, args: object, expected: list[str]
) -> None:
    hub.answers[op] = answer
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert (hub.asked[0][0], hub.asked[0][1]) == (op, args)
    found = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert [line for line in expected if line not in found] == [], result.stdout
    assert "\x1b" not in result.stdout
    for spelling in (["--json", *arguments], [*arguments, "--json"]):
        assert isinstance(json.loads(run(*spelling).stdout), dict)


def test_status(hub: FakeHub, run: Ctl) -> None:
    hub.answers |= {"status": STATUS, "stats": {(2, 0): STATS}}
    hub.workers = ((2, 0), (2, 1))
    hub.answers["stats"] = {(2, 0): STATS, (2, 1): "!late"}
    result = run("status")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for words in ("serving, generation 2", "1 worker restarts", "3 sessions: 3 joined",
                  "reason: the last reload failed reason: at 3",
                  "2 0 8 serving 3 40M 1m30s 17", "2 1 8 serving no answer"):
        assert words in text, words
    assert result.stderr == "gateway: worker 1 of generation 2 is not included: late\n"
    assert set(json.loads(run("status", "--json").stdout)) == {"info", "stats"}


STEERING = [
    # arguments, operation, its answer, its arguments, what is said
    (["kill", "A/B"], "kill", {"id": "A/B", "state": "ending"}, {"id": "A/B"}, "A/B: ending"),
    (["upstream", "mta/smtp://[::1]:25", "drain"], "upstream", {"pool": "mta", "server": "smtp://[::1]:25"},
     {"pool": "mta", "server": "smtp://[::1]:25", "action": "drain"}, "mta/smtp://[::1]:25: drain"),
    (["upstream", "mta/a", "weight", "0", "--pipeline", "mx"], "upstream", {"pool": "mta", "server": "smtp://a:25"},
     {"pool": "mta", "server": "a", "action": "weight", "weight": 0, "pipeline": "mx"}, "mta/smtp://a:25: weight 0"),
    (["limits", "clear", "k"], "limits_clear", True, {"key": "k"}, "k: cleared"),
    (["auth-cache", "clear"], "auth_cache_clear", 2, {}, "2 forgotten"),
    (["auth-cache", "clear", "kim"], "auth_cache_clear", 0, {"user": "kim"}, "0 forgotten"),
    (["bans", "add", "192.0.2.1", "--for", "2d", "--reason", "x"], "ban_add", {"network": "192.0.2.1", "until": 60},
     {"network": "192.0.2.1", "seconds": 172800, "reason": "x"}, "192.0.2.1 is banned until 1970-01-01 00:01:00Z"),
    (["bans", "remove", "192.0.2.0/24"], "ban_remove", 1, {"network": "192.0.2.0/24"}, "192.0.2.0/24: not banned any more"),
    (["reload"], "reload", {"ok": True, "generation": 3, "error": ""}, {}, "generation 3 serves"),
    (["stop"], "stop", {"ok": True}, {"now": False}, "stopping"),
    (["stop", "--now"], "stop", {"ok": True}, {"now": True}, "stopping"),
    (["log-level", "debug"], "log_level", {"level": "debug"}, {"level": "debug"}, "log level debug"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "op", "answer", "args", "said"), STEERING)
def test_steering(
    hub: FakeHub, run: Ctl, arguments: list[str], op: str, answer: Any, args: object, said: str
) -> None:
    hub.answers[op] = answer
    result = run(*arguments)
    assert (result.exit_code, result.output) == (0, f"{said}\n")
    assert (hub.asked[0][0], hub.asked[0][1]) == (op, args)


REFUSED = ["mx.yaml:3: unknown key", "mx.yaml:9: \x1bno", "gateway: smtp://:25: cannot listen"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["kill", "X"], 1, "gateway: no open session X\n"),
        (["upstream", "mta/a", "drain"], 1, "gateway: a may be any of these: smtp://a:25, smtps://a:465\n"),
        (["reload"], 1, "gateway: mx.yaml:3: unknown key\ngateway: mx.yaml:9: \\x1bno\n"),
        (["reload"], 1, "gateway: mx.yaml:9: \\x1bno\ngateway: smtp://:25: cannot listen\n"),
        (["upstream", "mta", "drain"], 2, "write POOL/SERVER"),
        (["upstream", "mta/a", "weight"], 2, "`weight` takes a number"),
        (["upstream", "mta/a", "drain", "3"], 2, "`drain` takes no number"),
        (["upstream", "mta/a", "stop"], 2, "'stop' is not one of"),
        (["bans", "add", "192.0.2.1", "--for", "soon"], 2, "write a duration"),
        (["log-level", "loud"], 2, "'loud' is not one of"),
        (["sessions", "--limit", "0"], 2, "0 is not in the range"),
        (["nothing"], 2, "No such command"),
        (["--url", "ftp://x", "status"], 2, "--url is http://host:port"),
        (["--token-file", "/nonexistent/token", "status"], 2, "/nonexistent/token: No such file or directory\n"),
    ],
)
def test_refusals(hub: FakeHub, run: Ctl, arguments: list[str], status: int, said: str) -> None:
    hub.answers["kill"] = None
    hub.answers["upstream"] = "!409 a may be any of these: smtp://a:25, smtps://a:465"
    hub.answers["reload"] = {"ok": False, "generation": 2, "error": "\n".join(REFUSED)}
    result = run(*arguments)
    assert result.exit_code == status and said in result.stderr, result.output
    assert result.stdout == ""


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "admin.sock"
    result = CliRunner().invoke(main, ["ctl", "--socket", str(path), "status"])
    assert result.exit_code == 3
    assert result.stderr.startswith(f"gateway: no answer at {path}: No such file or directory; is the gateway running")
    # The usual socket: one's own, else the system's.
    monkeypatch.setattr(ctl_client, "default_socket", lambda: tmp_path / "mine")
    monkeypatch.setattr(ctl_client, "SERVICE_SOCKET", path)
    assert str(tmp_path / "mine") in CliRunner().invoke(main, ["ctl", "status"]).stderr
    path.touch()
    assert str(path) in CliRunner().invoke(main, ["ctl", "status"]).stderr


def test_over_tcp_with_a_token(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.answers["bans"] = []
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    for url in served(hub, "127.0.0.1:0", "s3cret"):
        def ctl(*arguments: str, url: str = url) -> Result:
            return CliRunner().invoke(main, ["ctl", "--url", url, *arguments])

        assert ctl("bans").exit_code == 1 and "show the token" in ctl("bans").stderr
        assert ctl("--token-file", str(token), "bans").exit_code == 0
        monkeypatch.setenv("GATEWAY_ADMIN_TOKEN", "s3cret")
        assert ctl("bans").exit_code == 0
        monkeypatch.setenv("GATEWAY_ADMIN_TOKEN", "other")
        assert ctl("bans").exit_code == 1


def test_follow_in_a_pipe(hub: FakeHub, run: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each session once, until ^C, which is no error."""
    seen: list[list[str]] = [["A"], ["B", "A"], ["C"]]

    def answers() -> None:
        ids = seen.pop(0)
        hub.answers["sessions"] = {"total": 1, "matched": 1, "sessions": [{**SESSION, "id": id} for id in ids]}

    def pause(_seconds: float) -> None:
        if not seen:
            raise KeyboardInterrupt
        answers()

    answers()
    monkeypatch.setattr(ctl, "_pause", pause)
    result = run("sessions", "--follow")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines() if line] == ["A", "B", "C"]


def test_a_table_on_a_terminal(hub: FakeHub, run: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctl_tables, "on_terminal", lambda: True)
    hub.answers["upstreams"] = POOLS
    hub.answers["bans"] = []
    assert "─" in run("upstreams").stdout
    assert run("bans").stdout == "nobody is banned\n"


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (ctl_tables.duration, 4.25, "4.2s"), (ctl_tables.duration, 59.9, "59s"), (ctl_tables.duration, 3599, "59m59s"),
        (ctl_tables.duration, 3600, "1h00m"), (ctl_tables.duration, 93_600, "1d02h"), (ctl_tables.duration, None, "0.0s"),
        (ctl_tables.octets, 1023, "1023"), (ctl_tables.octets, 1024, "1.0K"), (ctl_tables.octets, 20 << 20, "20M"),
        (ctl_tables.octets, 3 << 40, "3.0T"), (ctl_tables.text_of, False, "no"), (ctl_tables.text_of, [], "-"),
        (ctl_tables.shown, "a\r\n\x7f\u202eb\udcff", r"a\r\n\x7f\u202eb\udcff"),
    ],
)  # fmt: skip
def test_texts(write: Callable[[Any], str], value: object, text: str) -> None:
    assert write(value) == text


def test_it_starts_without_what_is_slow_to_import() -> None:
    code = "import sys, gateway.cli.ctl; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "gateway.cli.ctl" in found
    assert not {"aiohttp", "uvloop", "rich.live", "gateway.service", "gateway.config", "gateway.pipeline"} & set(found)
