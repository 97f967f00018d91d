"""The line for people: what it says, and that nobody else can make one."""

from __future__ import annotations

import contextvars
import os
import re
import time

import pytest

from gateway.observe import logs
from gateway.observe.lines import Record, Render, as_json, as_sentence, as_text

HEAD: Record = {"time": "2026-11-21T10:00:00.000Z", "level": "info", "logger": "gateway.x"}
HOSTILE = 'a"\r\n2026/11/21 10:00:00 [info] 1: client logged in\x1b[2J\x00\x7f\x9b\u202e\u2028\tz'


def sentence(name: str, **keys: object) -> str:
    return as_sentence({**HEAD, "record": name, **keys}, 0.0).decode()


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        (
            "auth",
            {"session": "7KQ2-M9X", "pipeline": "mx", "user": "tim", "client": "192.0.2.1", "mechanism": "PLAIN"},
            '*7KQ2-M9X client logged in, client: 192.0.2.1, pipeline: mx, user: "tim", mechanism: PLAIN',
        ),
        ("stop", {}, "the last session is over"),
        ("warning", {"text": "mend it, soon", "pipeline": "mx"}, "mend it, soon, pipeline: mx"),
        ("upstream_down", {"server": "smtp://a:25", "pool": "p"}, "upstream smtp://a:25 is down, pool: p"),
        ("upstream_down", {"pool": "p"}, "upstream down, pool: p"),
        ("of_a_stage", {"a": "", "b": "x, y", "c": ["x"], "d": 0.5}, 'of a stage, a: "", b: "x, y", c: ["x"], d: 0.5'),
        ("stop", {"exception": "Traceback:\n  File\nValueError: x"}, 'the last session is over, exception: "ValueError: x"'),
    ],
)  # fmt: skip
def test_sentence(name: str, keys: dict[str, object], said: str) -> None:
    assert sentence(name, **keys) == said


def test_text_has_time_level_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XYZ-2")
    time.tzset()
    try:
        line = as_text({**HEAD, "record": "stop", "exception": "one\ntwo"}, 1_700_000_000.7).decode()
    finally:
        monkeypatch.undo()
        time.tzset()
    assert line == f"2023/11/15 00:13:20 [info] {os.getpid()}: the last session is over\n    one\n    two"


def test_the_listener_of_a_session_is_named() -> None:
    def session() -> str:
        logs.listener.set("smtp://127.0.0.1:25")
        return sentence("session", client="192.0.2.1", helo="x")

    said = contextvars.copy_context().run(session)
    assert said == 'session ended, client: 192.0.2.1, listener: smtp://127.0.0.1:25, helo: "x"'
    assert "listener" not in sentence("session", client="192.0.2.1")


@pytest.mark.parametrize("key", ["text", "line", "client", "user", "session", "pipeline", "exception", "to"])
@pytest.mark.parametrize("render", [as_text, as_sentence, as_json])
@pytest.mark.parametrize("name", ["warning", "transcript", "auth", HOSTILE])
def test_nothing_breaks_a_line(key: str, name: str, render: Render) -> None:
    record: Record = {**HEAD, "record": name, key: [HOSTILE] if key == "to" else HOSTILE}
    first, *others = render(record, 0.0).decode().split("\n")
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u202e]", "".join((first, *others)))
    assert all(line.startswith("    ") for line in others)
    assert not others or (key == "exception" and render is as_text)


def test_what_a_client_says_stays_in_its_quotes() -> None:
    said = sentence("auth_failure", user='x", cause: "authentication failed', cause="other")
    assert said == r'client login failed, user: "x\", cause: \"authentication failed", cause: other'


@pytest.mark.parametrize("render", [as_text, as_sentence, as_json])
def test_secrets(render: Render) -> None:
    logs.register_secret('hunter"22')
    try:
        line = render({**HEAD, "record": "warning", "text": 'x hunter"22', "exception": 'E: hunter"22'}, 0.0).decode()
    finally:
        logs.forget_secrets()
    assert "hunter" not in line and "x [redacted]" in line and "E: [redacted]" in line
