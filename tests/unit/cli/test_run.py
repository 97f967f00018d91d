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

from gateway.cli.pid_file import PidFile

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


def served(folder: Path, ports: list[int], *files: str) -> list[str]:
    """Serve until each port was greeted and left: what came on standard error."""
    command = [sys.executable, "-m", "gateway", "run", "--no-supervisor", *files]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        written = []
        for line in process.stderr:
            written.append(line)
            if line == "gateway: ready\n":
                break
        try:
            for port in ports:
                with socket.create_connection(("127.0.0.1", port), 5) as client, client.makefile("rwb", 0) as stream:
                    assert stream.readline().startswith(b"220")
                    stream.write(b"NOOP\r\nQUIT\r\n")
                    assert b"221" in stream.read()
        finally:
            process.send_signal(signal.SIGTERM)
        written += process.stderr.readlines()
        assert process.wait(10) == 0
    return written


def test_pipelines_and_listeners_with_logs_of_their_own(write: Write, tmp_path: Path) -> None:
    ports = [free_port() for _ in range(4)]
    pool = "{mta: {servers: [smtp://127.0.0.1:1], capabilities: {assume: [SIZE 1000]}}}"
    one, own, two, plain = (f"smtp://127.0.0.1:{port}" for port in ports)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "syslog"))
        daemon.settimeout(10)
        syslog = f"{{to: syslog, address: 'unix:{tmp_path}/syslog', tag: one, facility: local0}}"
        write(
            listen=f"[{one}, {{url: '{own}', log: {{file: own.log}}}}]", upstreams=pool, process="{log: {level: error}}",
            log=f"{{sinks: [{{to: file, path: one.log}}, {syslog}]}}",
        )  # fmt: skip
        write("two.yaml", listen=f"['{two}']", upstreams=pool, log="{format: text, file: two.log}")
        write("plain.yaml", listen=f"['{plain}']", upstreams=pool)
        written = served(tmp_path, ports, "one.yaml", "two.yaml", "plain.yaml")
        messages = [daemon.recv(4096).decode()]
        while "session ended" not in messages[-1]:
            messages.append(daemon.recv(4096).decode())
    assert [line for line in written if line.startswith("{")] == [], "only errors go to standard error"
    records = [json.loads(line) for line in (tmp_path / "one.log").read_text().splitlines()]
    assert {record["pipeline"] for record in records} == {"one"} and len(records) == len(messages)
    (number,) = [record["session"] for record in records if record["record"] == "session"]
    (accepts,) = [message for message in messages if "pipeline one accepts connections" in message]
    assert accepts.startswith("<134>")
    assert " one[" in messages[-1] and f"*{number} session ended, client: 127.0.0.1, " in messages[-1]
    assert "pipeline two accepts" in (text := (tmp_path / "two.log").read_text()) and "session ended, client: " in text
    *_, last = [json.loads(line) for line in (tmp_path / "own.log").read_text().splitlines()]
    assert (last["record"], last["pipeline"]) == ("session", "one") and last["session"] != number


def test_a_log_that_all_pipelines_want_is_the_process_s(write: Write, tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    pool = "{mta: {servers: [smtp://127.0.0.1:1], capabilities: {assume: [SIZE 1000]}}}"
    for name, port in zip(("one.yaml", "two.yaml"), ports, strict=True):
        write(name, listen=f"['smtp://127.0.0.1:{port}']", upstreams=pool, log="{file: both.log}")
    assert served(tmp_path, [], "one.yaml", "two.yaml") == ["gateway: ready\n"]
    records = [json.loads(line)["record"] for line in (tmp_path / "both.log").read_text().splitlines()]
    assert [record for record in records if record in ("start", "stop")] == ["start", "start", "stop"]


@pytest.mark.parametrize(("path", "said"), [("nowhere/gw.pid", "No such file or directory"), ("..", "Is a directory")])
def test_a_pid_file_that_cannot_be_written(gateway: Command, write: Write, path: str, said: str) -> None:
    write()
    result = gateway("run", "--pid-file", path, "one.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"gateway: pid file {path}: {said}\n"


def test_no_pid_file_of_a_process_that_does_not_start(gateway: Command, write: Write, tmp_path: Path) -> None:
    with listening() as port:
        write(listen=f"[smtp://127.0.0.1:{port}]")
        assert gateway("run", "--pid-file", "gw.pid", "one.yaml").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["one.yaml"]


def test_a_pid_file_of_another_process_stays(tmp_path: Path) -> None:
    path = tmp_path / "gw.pid"
    with PidFile(path) as file:
        assert not path.exists()
        file.publish()
        assert path.read_text() == f"{os.getpid()}\n"
        path.write_text("1\n")
    assert path.read_text() == "1\n" and list(tmp_path.iterdir()) == [path]


def test_the_pid_file_stands_while_it_serves(write: Write, tmp_path: Path) -> None:
    """Of a file with two pipelines: it is there once both listen, and gone after the stop."""
    ports = free_port(), free_port()
    one, two = (write(f"{port}.yaml", listen=f"[smtp://127.0.0.1:{port}]").read_text() for port in ports)
    (tmp_path / "both.yaml").write_text(f"{one}---\n{two}")
    command = [sys.executable, "-m", "gateway", "run", "--no-supervisor", "--pid-file", "gw.pid", "both.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stderr is not None
        assert "gateway: ready\n" in iter(process.stderr.readline, "")
        assert (tmp_path / "gw.pid").read_text() == f"{process.pid}\n"
        for port in ports:
            socket.create_connection(("127.0.0.1", port), 5).close()
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(10) == 0
    assert not [path for path in tmp_path.iterdir() if "pid" in path.name]


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_it_serves_and_stops(write: Write, tmp_path: Path, loop: str) -> None:
    port = free_port()
    write(
        listen=f"[smtp://127.0.0.1:{port}]",
        stages="[splice: {handoff: always}]",
        upstreams="{mta: {servers: [smtp://127.0.0.1:1], capabilities: {assume: [SIZE 1000]}}}",
        process="{log: {debug_clients: [127.0.0.1]}}",
    )
    command = [sys.executable, "-m", "gateway", "run", "--no-supervisor", "--loop", loop, "one.yaml"]
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
