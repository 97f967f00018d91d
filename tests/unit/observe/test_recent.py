"""The last records of a process, by session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.observe import logs, recent


@pytest.fixture(autouse=True)
def log_file(tmp_path: Path) -> Iterator[Path]:
    recent.records.clear()
    path = tmp_path / "log"
    logs.configure("json", "info", file=str(path))
    yield path
    logs.forget_secrets()
    logs.configure("json", "info")
    recent.records.clear()


def test_what_a_session_logged_is_what_the_log_has(log_file: Path) -> None:
    log = logs.get_logger("gateway.x")
    logs.register_secret("tanstaaf")
    log.info("refusal", session="AAAA-BBB", client="192.0.2.1", text="tanstaaf", raw=b"\xff", user=None)
    log.info("refusal", session="CCCC-DDD")
    log.info("start", pipeline="mx")
    log.debug("session", session="AAAA-BBB")  # nobody wants it
    log.warning("session", session="AAAA-BBB")
    written = [json.loads(line) for line in log_file.read_text().splitlines()]
    assert recent.of("AAAA-BBB") == [written[0], written[3]]
    assert "tanstaaf" not in str(recent.of("AAAA-BBB"))
    assert recent.of("") == []


def test_the_last_ones_are_kept() -> None:
    log = logs.get_logger("gateway.x")
    for number in range(recent.KEPT + 10):
        log.info("refusal", session=str(number % 2), number=number)
    kept = [record["number"] for record in recent.of("1")]
    assert kept == list(range(11, recent.KEPT + 10, 2))
