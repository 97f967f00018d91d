"""examples/stage-package, as its user meets it: installed by pip, named in a pipeline file, and with its own tests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from gateway.testing.gateway import free_port

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "stage-package"
LIMIT = 60.0


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed, beside the gateway of this checkout."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, *offline, "--target", str(target), str(PACKAGE)], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(target), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def gateway(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, cwd=PACKAGE)


def test_is_listed_and_documents_itself(installed: dict[str, str]) -> None:
    assert "quiet_hours          check     Refuse mail from given networks" in gateway(installed, "stages").stdout
    shown = gateway(installed, "stages", "quiet_hours").stdout
    assert shown.startswith("quiet_hours: check; asked in mail")
    for setting in ("from", "to", "networks", "answer"):
        assert f"\n  {setting} " in shown


def test_is_checked_by_name(installed: dict[str, str], tmp_path: Path) -> None:
    done = gateway(installed, "check", "quiet.yaml")
    assert done.returncode == 0, done.stderr
    assert "night        check     mail    " in done.stdout and "night.active" in done.stdout
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((PACKAGE / "quiet.yaml").read_text().replace("networks:", "network:"))
    done = gateway(installed, "check", str(wrong))
    assert done.returncode == 2
    assert "wrong.yaml:6:" in done.stderr and "unknown setting 'network'; did you mean 'networks'?" in done.stderr


def test_is_unknown_where_it_is_not_installed() -> None:
    done = gateway({**os.environ, "PYTHONPATH": str(ROOT)}, "check", "quiet.yaml")
    assert done.returncode == 2 and "unknown stage 'quiet_hours'" in done.stderr


def test_its_own_tests_pass(installed: dict[str, str]) -> None:
    """They run on the installed package, not on its source."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, timeout=LIMIT, cwd=PACKAGE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@asynccontextmanager
async def serving(environment: dict[str, str], folder: Path, begin: str, end: str) -> AsyncIterator[int]:
    """`gateway run quiet.yaml` with these hours; its port."""
    port = free_port()
    own = {"QUIET_LISTEN": f"127.0.0.1:{port}", "QUIET_FROM": begin, "QUIET_TO": end, "QUIET_MAIL": f"{folder}/mail"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "run", "--no-supervisor", "quiet.yaml",
        env={**environment, **own}, cwd=PACKAGE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    try:
        async with asyncio.timeout(LIMIT):
            while "gateway: ready" not in said:
                line = await process.stderr.readline()
                assert line, f"the gateway ended:\n{said}"
                said += line.decode()
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(LIMIT):
            await process.communicate()
    assert process.returncode == 0


async def dialogue(port: int, source: str, *lines: str) -> list[str]:
    """The last lines of the replies to these lines, from this client address."""
    async with asyncio.timeout(LIMIT):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        replies = []
        for line in ("", *lines):
            writer.write(f"{line}\r\n".encode() if line else b"")
            answer = "-"
            while answer[3:4] in ("-", ""):
                answer = (await reader.readline()).decode().rstrip("\r\n")
            replies.append(answer)
        writer.close()
        return replies[1:]


@pytest.mark.anyio
async def test_serves_real_sessions(installed: dict[str, str], tmp_path: Path) -> None:
    now = datetime.now()
    quiet = [f"{now - timedelta(hours=2):%H:%M}", f"{now + timedelta(hours=2):%H:%M}"]
    message = ["EHLO me", "MAIL FROM:<a@example.org>", "RCPT TO:<everybody@example.org>", "RCPT TO:<b@example.org>"]
    async with serving(installed, tmp_path, *quiet) as port:
        _, mail, *rest = await dialogue(port, "127.0.0.2", *message)
        assert mail.startswith(f"450 4.7.1 no mail before {quiet[1]} (")
        assert [reply[:3] for reply in rest] == ["503", "503"]
        _, mail, everybody, one, data, end = await dialogue(port, "127.0.0.1", *message, "DATA", "Hello.\r\n.")
        assert [reply[:3] for reply in (mail, everybody, one, data, end)] == ["250", "554", "250", "354", "250"]
        assert len(list((tmp_path / "mail" / "new").iterdir())) == 1
    async with serving(installed, tmp_path, quiet[1], quiet[0]) as port:
        _, *replies = await dialogue(port, "127.0.0.2", *message)
        assert [reply[:3] for reply in replies] == ["250", "250", "250"]
