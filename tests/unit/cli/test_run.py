"""`gateway run`: it serves or says on standard error why not, and stops when told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result

Command = Callable[..., Result]
Write = Callable[..., Path]


@contextmanager
def listening() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def free_port() -> int:
    with listening() as port:
        return port


def test_a_port_in_use(gateway: Command, write: Write) -> None:
    with listening() as port:
        write(listen=f"[smtp://127.0.0.1:{port}]")
        result = gateway("run", "one.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"gateway: smtp://127.0.0.1:{port}: cannot listen: Address already in use" in result.stderr


def test_nothing_half_starts(gateway: Command, write: Write) -> None:
    """One bad listener of two: the other port is free again."""
    port = free_port()
    with listening() as used:
        write(listen=f"[smtp://127.0.0.1:{port}, smtp://127.0.0.1:{used}]")
        assert gateway("run", "one.yaml").exit_code == 2
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"stages": "[splise]"}, "one.yaml:4:10: stages[0].splise: unknown stage"),
        ({"log": "{file: /nowhere/at/all/log}"}, "gateway: log file /nowhere/at/all/log: No such file or directory"),
    ],
)
def test_what_is_wrong_before_the_start(gateway: Command, write: Write, keys: dict[str, object], said: str) -> None:
    write(**keys)
    result = gateway("run", "one.yaml")
    assert (result.exit_code, result.stdout) == (2, "") and said in result.stderr


def test_pipelines_that_want_different_logs(gateway: Command, write: Write) -> None:
    write(log="{format: text}")
    write("two.yaml", listen="[smtp://127.0.0.1:2598]", log="{format: json}")
    result = gateway("run", "one.yaml", "two.yaml")
    assert result.exit_code == 2 and "write it below process.log" in result.stderr


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_it_serves_and_stops(write: Write, tmp_path: Path, loop: str) -> None:
    port = free_port()
    write(
        listen=f"[smtp://127.0.0.1:{port}]",
        stages="[splice: {handoff: always}]",
        upstreams="{mta: {servers: [smtp://127.0.0.1:1], capabilities: {assume: [SIZE 1000]}}}",
        process="{log: {debug_clients: [127.0.0.1]}}",
    )
    command = [sys.executable, "-m", "gateway", "run", "--loop", loop, "one.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stderr is not None
        written = []
        for line in process.stderr:
            written.append(line)
            if line == "gateway: ready\n":
                break
        process.send_signal(signal.SIGHUP)
        with socket.create_connection(("127.0.0.1", port), 5) as client, client.makefile("rwb") as stream:
            assert stream.readline().startswith(b"220 gw.example.org ESMTP")
            process.send_signal(signal.SIGTERM)
            assert stream.readline().startswith(b"421 4.3.2")
        written += process.stderr.readlines()
        assert process.wait(10) == 0
    records = [json.loads(line) for line in written if line.startswith("{")]
    texts = [record["text"] for record in records if record["record"] == "warning"]
    assert len(texts) == 2 and "handoff: always" in texts[0] and texts[1].startswith("SIGHUP")
    assert any(record["record"] == "transcript" for record in records), "debug_clients of the process"
    assert [record["record"] for record in records][-1] == "stop"
