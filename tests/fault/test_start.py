"""`gateway run` as a process: what keeps it from starting, and how it stops.

What is wrong is said on standard error, with its place where it is a file's fault, and nothing half-starts.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault.client import Client
from tests.fault.gateway_run import GATEWAY, configure, started
from tests.fault.upstream import Upstream
from tests.peers.process import free_port, wait_for

PLACE = re.compile(r"pipeline\.yaml:\d+:\d+: ")


def run(folder: Path, *files: str) -> subprocess.CompletedProcess[str]:
    """`gateway run`, which must end by itself."""
    return subprocess.run(
        [*GATEWAY, "run", *(files or ("pipeline.yaml",))], cwd=folder, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip


def children(folder: Path) -> list[str]:
    """Processes that know of this folder."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in command and int(name) != os.getpid():
            found.append(command)
    return found


def listens(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- what keeps it from starting --------------------------------------------------------------------------------

# {port} is free, {taken} is not; whatever fails, an embedded upstream was asked for
BEGIN = "listen: [smtp://127.0.0.1:{port}]\n"
END = 'stages: [{{splice: mail}}]\nupstreams: {{mail: {{servers: ["embedded://mail"]}}}}\n'

# the pipeline, whether it is the file's fault, and what must be said
FAULTS: dict[str, tuple[str, bool, str]] = {
    "port in use": (
        "listen: [smtp://127.0.0.1:{port}, smtp://127.0.0.1:{taken}]\n" + END, False,
        "smtp://127.0.0.1:{taken}: cannot listen: Address already in use",
    ),
    "no folder for a socket": (
        "listen: [smtp://127.0.0.1:{port}, \"smtp+unix:/nowhere/at/all\"]\n" + END, False,
        "cannot listen: No such file or directory",
    ),
    "missing certificate": (
        BEGIN + "tls: {{certificates: [{{chain: no.crt, key: no.key}}]}}\n" + END, True, "there is no file 'no.crt'",
    ),
    "unreadable certificate": (
        BEGIN + "tls: {{certificates: [{{chain: garbage, key: garbage}}]}}\n" + END, True, "garbage",
    ),
    "key of another certificate": (
        BEGIN + "tls: {{certificates: [{{chain: good.crt, key: other.key}}]}}\n" + END, True, "other.key",
    ),
    "missing users file": (
        BEGIN + "allow_plaintext_auth: true\n" + END.replace("[{{splice", "[{{auth_file: no.users}}, {{splice"), True,
        "no.users",
    ),
    "bad YAML": (BEGIN + "stages: [splice\nupstreams: {{}}\n", True, ""),
    "empty": ("", False, "pipeline.yaml"),
    "unknown stage": (BEGIN + END.replace("[{{splice", "[rate_limits, {{splice"), True, "did you mean 'rate_limit'?"),
    "duplicate key": (BEGIN + BEGIN + END, True, "listen"),
    "no folder for the log": (BEGIN + "log: {{file: nowhere/gateway.log}}\n" + END, False, "nowhere/gateway.log"),
    "an embedded upstream in a file's place": (
        BEGIN + "stages: [{{splice: mail}}]\n"
        "upstreams: {{mail: {{servers: [\"embedded://mail\"]}}, other: {{servers: [\"embedded://garbage\"]}}}}\n",
        False, "embedded://garbage: the embedded server does not start",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said_and_nothing_starts(fault: str, tmp_path: Path, tls_files: tuple[Path, Path]) -> None:
    import trustme

    text, by_file, expected = FAULTS[fault]
    (tmp_path / "garbage").write_text("this is no certificate\n")
    (tmp_path / "good.crt").write_bytes(tls_files[0].read_bytes())
    trustme.CA().issue_cert("other.test").private_key_pem.write_to_path(str(tmp_path / "other.key"))
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        configure(tmp_path, text.format(port=port, taken=taken) if "{" in text else text)
        ended = run(tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert expected.format(taken=taken) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert bool(PLACE.search(ended.stderr)) == by_file, ended.stderr
    assert not listens(port)
    assert children(tmp_path) == []


def test_no_such_file(tmp_path: Path) -> None:
    ended = run(tmp_path, "nothing.yaml")
    assert ended.returncode == 2
    assert "nothing.yaml" in ended.stderr and "Traceback" not in ended.stderr


def test_a_stage_that_does_not_start(tmp_path: Path) -> None:
    """The embedded upstream was running by then."""
    program = """
import sys
from gateway import Stage
from gateway.pipeline.registry import Registry
class Broken(Stage):
    async def start(self, worker):
        raise RuntimeError("no license")
init = Registry.__init__
def with_broken(self):
    init(self)
    self.add("broken", Broken)
Registry.__init__ = with_broken
from gateway.cli import main
sys.argv = ["gateway", "run", "--no-supervisor", "pipeline.yaml"]
main()
"""
    port = free_port()
    configure(tmp_path, (BEGIN + END).format(port=port).replace("[{splice", "[broken, {splice"))
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "stage broken does not start: RuntimeError: no license" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not listens(port)
    assert children(tmp_path) == []


# -- running ----------------------------------------------------------------------------------------------------


ENVELOPE = {"stages": [{"splice": {"handoff": "never"}}]}
UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["here"])


@pytest.mark.anyio
@UVLOOP
@pytest.mark.parametrize(("loop", "number"), [("uvloop", signal.SIGTERM), ("asyncio", signal.SIGINT)])
async def test_a_stop_loses_no_message_and_takes_its_leave(tmp_path: Path, loop: str, number: signal.Signals) -> None:
    """Promise 8: whoever is idle is told at once; messages under way are completed, then their clients are told."""
    async with (
        asyncio.timeout(30),
        Upstream("end") as upstream,
        started(tmp_path, {**ENVELOPE, "upstreams": upstream.pool()}, "--loop", loop) as gateway,
    ):
        idle, open_, sending, waiting = [await gateway.client() for _ in range(4)]
        for client in (open_, sending, waiting):
            assert (await client.say("MAIL FROM:<a@example.org>")).startswith("250")
            assert (await client.say("RCPT TO:<b@example.org>")).startswith("250")
        for client in (sending, waiting):
            assert (await client.say("DATA")).startswith("354")
        sending.send(b"Subject: half\r\n\r\nof it")
        waiting.send(b"Subject: whole\r\n\r\nall of it\r\n.\r\n")
        await upstream.reached.wait()

        gateway.process.send_signal(number)
        assert (await idle.reply()).startswith("421 4.3.2 ")
        assert await idle.reply() == ""
        assert not listens(gateway.port)

        assert (await open_.say("DATA")).startswith("354")  # a transaction that was begun may be ended
        for client in (open_, sending):
            client.send(b" and the rest\r\n.\r\n")
        upstream.release()
        for client in (open_, sending, waiting):
            assert await client.reply() == "250 2.0.0 queued\r\n"
            assert (await client.reply()).startswith("421 4.3.2 ")
            assert await client.reply() == ""
        assert await gateway.ended() == 0
    assert len(upstream.messages) == 3
    assert sum('"record":"transaction"' in line for line in gateway.log) == 3
    assert '"record":"stop"' in gateway.log[-1]


@pytest.mark.anyio
@UVLOOP
async def test_whoever_is_not_done_in_time_is_told_too(tmp_path: Path) -> None:
    """After `drain` nobody is waited for, and nobody is left without a goodbye."""
    users = tmp_path / "users"
    users.write_text("tim@example.org:{PLAIN}tanstaaf\n")
    stages = [{"auth_file": {"file": str(users), "required": False}}, *ENVELOPE["stages"]]
    async with asyncio.timeout(30), Upstream("MAIL") as upstream:
        settings = {
            "stages": stages,
            "allow_plaintext_auth": True,
            "upstreams": upstream.pool(),
            "process": {"drain": "300ms"},
        }
        async with started(tmp_path, settings) as gateway:
            login, mail, content = [await gateway.client() for _ in range(3)]
            assert (await login.say("AUTH LOGIN")).startswith("334")
            mail.send(b"MAIL FROM:<a@example.org>\r\n")
            await upstream.reached.wait()
            upstream.release()
            assert (await mail.reply()).startswith("250")
            for line in ("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA"):
                assert (await content.say(line))[0] in "23"
            content.send(b"Subject: half")
            gateway.process.send_signal(signal.SIGTERM)
            for client in (login, mail, content):
                assert (await client.reply()).startswith("421 4.3.2 ")
                assert await client.reply() == ""
            assert await gateway.ended() == 0
    assert upstream.messages == []


@pytest.mark.anyio
@UVLOOP
async def test_one_unix_socket_is_served_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "smtp.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # of a process that is gone: nobody listens
    async with asyncio.timeout(30), Upstream() as upstream:
        settings = {**ENVELOPE, "listen": [f"smtp+unix:{path}"], "upstreams": upstream.pool()}
        async with started(tmp_path, settings) as gateway:
            second = await asyncio.to_thread(run, tmp_path)
            assert second.returncode == 2
            assert "cannot listen: Address already in use" in second.stderr
            client = Client(*await asyncio.open_unix_connection(str(path)))
            await client.hello()
            gateway.process.send_signal(signal.SIGTERM)
            assert (await client.reply()).startswith("421 4.3.2 ")
            assert await gateway.ended() == 0, gateway.log
    assert not path.exists()


@pytest.mark.anyio
@UVLOOP
async def test_the_embedded_upstream_ends_with_its_gateway(tmp_path: Path) -> None:
    pool = {"mail": {"servers": [f"embedded://{tmp_path}/mail"]}}
    for number in (signal.SIGTERM, signal.SIGKILL):
        async with asyncio.timeout(30), started(tmp_path, {**ENVELOPE, "upstreams": pool}) as gateway:
            assert len(children(tmp_path)) == 2  # it, and its upstream
            gateway.process.send_signal(number)
            assert await gateway.ended() == (0 if number == signal.SIGTERM else -signal.SIGKILL)
            await asyncio.to_thread(wait_for, lambda: not children(tmp_path), "the end of the embedded upstream")
