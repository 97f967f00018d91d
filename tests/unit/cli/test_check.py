"""`gateway check`: the table, the grade with its reason, every problem at once on standard error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Command = Callable[..., Result]
Write = Callable[..., Path]


def test_the_table(gateway: Command, write: Write) -> None:
    write(
        stages="""
  - greeting_delay: {seconds: 1s, mode: observe}
  - reverse_dns
  - rate_limit: {id: slow, count: messages, limit: 10/hour, when: 'client.name == ""'}
  - xclient
  - splice"""
    )
    result = gateway("check", "one.yaml")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["pipeline", "one:", "smtp://127.0.0.1:2599"]
    assert lines[1] == ["stage", "kind", "phases", "when", "mode", "provides"]
    assert lines[2] == ["greeting_delay", "check", "connect", "greeting", "observe"]
    assert lines[3][:4] == ["reverse_dns", "plumbing", "connect", "enforce"] and "client.name" in lines[3]
    assert lines[4] == ["slow", "guard", "mail", "client.name", "==", '""', "enforce"]
    assert lines[5] == ["xclient", "plumbing", "upstream_ready", "enforce"]
    assert lines[6] == ["splice", "plumbing", "enforce"]
    assert "  grade: envelope (slow is asked at each MAIL)" in result.stdout
    assert "  upstream mta: smtp://127.0.0.1:1" in result.stdout


def test_folders_and_warnings(gateway: Command, write: Write, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    write("conf/one.yaml", stages="[splice: {handoff: always}]")
    write("conf/two.yaml", listen="[smtp://127.0.0.1:2598]")
    result = gateway("check", "conf")
    assert result.exit_code == 0
    assert result.stdout.count("pipeline ") == 2 and result.stdout.count("warning: splice.handoff: always") == 1


def test_all_problems_at_once(gateway: Command, write: Write) -> None:
    write(stages="[greeting_delay: soon, splise]", listne="x")
    write("two.yaml", stages="[splice, {splice: {pol: mta}}]", listen="[smtp://127.0.0.1:2598]")
    result = gateway("check", "one.yaml", "two.yaml", "none.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert any(line.startswith("none.yaml: no such file") for line in lines)
    assert any(line.startswith("one.yaml:6:1: listne: unknown key") or "listne" in line for line in lines)


def test_problems_of_stages_in_several_files(gateway: Command, write: Write) -> None:
    write(stages="[greeting_delay: soon, splise]")
    write("two.yaml", stages="[{splice: {pol: mta}}]", listen="[smtp://127.0.0.1:2598]")
    result = gateway("check", "one.yaml", "two.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    first, second, third = result.stderr.splitlines()
    assert first.startswith("one.yaml:4:") and "stages[0].greeting_delay" in first and "'soon'" in first
    assert second.startswith("one.yaml:4:") and "did you mean 'splice'?" in second
    assert third.startswith("two.yaml:4:") and "stages[0].splice" in third and "'pol'" in third


def test_no_file_is_a_usage_error(gateway: Command) -> None:
    result = gateway("check")
    assert result.exit_code == 2 and "Missing argument" in result.stderr


def test_heavy_libraries_are_not_loaded(write: Write, tmp_path: Path) -> None:
    """It answers within half a second of processor time: what only a running gateway needs is left alone."""
    write(stages="[{greeting_delay: 1s}, xclient, splice]")
    heavy = ("aiohttp", "aiosmtpd", "uvloop", "argon2", "passlib", "libpass", "anyio")
    program = f"""
import resource, sys
from gateway.cli import main
main(["check", "one.yaml"], standalone_mode=False)
used = resource.getrusage(resource.RUSAGE_SELF)
print([name for name in {heavy!r} if name in sys.modules], used.ru_utime + used.ru_stime)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded, _, seconds = done.stdout.splitlines()[-1].rpartition(" ")
    assert loaded == "[]"
    assert float(seconds) < 2.0  # 0.35 s on the machine it was made on; much more means that something crept in
