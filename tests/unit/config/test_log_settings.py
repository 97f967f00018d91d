"""`log:` in pipeline files: what may be written, and which sinks it opens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from gateway.config.log_settings import Log, LogSinks
from gateway.observe.sinks import LEVELS, Stream


def opened(folder: Path, **keys: object) -> list[tuple[str, int, str]]:
    """Class, threshold and form of each sink."""
    sinks = LogSinks.model_validate(keys, context={"folder": folder}).open()
    try:
        return [(type(sink).__name__, sink.threshold, sink.render.__name__) for sink in sinks]
    finally:
        for sink in sinks:
            sink.close()


def test_the_short_form_is_one_sink(tmp_path: Path) -> None:
    assert opened(tmp_path) == [("Stream", LEVELS["info"], "as_json")]
    assert opened(tmp_path, file=f"{tmp_path}/x", format="text", level="error") == [("Stream", 40, "as_text")]
    assert (tmp_path / "x").exists()


def test_sinks_take_what_they_do_not_say_from_the_log(tmp_path: Path) -> None:
    sinks = [
        {"to": "stderr"}, {"to": "file", "path": f"{tmp_path}/y", "format": "json", "level": "warning"},
        {"to": "syslog", "address": f"unix:{tmp_path}/log", "facility": "local7", "tag": "mx"},
    ]  # fmt: skip
    assert opened(tmp_path, format="text", level="debug", sinks=sinks) == [
        ("Stream", 10, "as_text"), ("Stream", 30, "as_json"), ("Syslog", 10, "as_sentence"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "level"),
    [("warn", "warning"), ("err", "error"), ("crit", "critical"), ("alert", "critical"), ("emerg", "critical"),
     ("notice", "notice"), ("debug", "debug")],
)  # fmt: skip
def test_names_of_levels(written: str, level: str) -> None:
    assert Log.model_validate({"level": written}).level == level


@pytest.mark.parametrize(
    ("log", "where", "said"),
    [
        ({"level": "loud"}, ("level",), "debug"),
        ({"sinks": []}, ("sinks",), "no sinks"),
        ({"file": "/x", "sinks": [{"to": "stderr"}]}, ("file",), "`file` beside `sinks`"),
        ({"sinks": [{"to": "printer"}]}, ("sinks", 0, "to"), "stderr"),
        ({"sinks": [{"to": "file"}]}, ("sinks", 0, "to"), "a file without its path"),
        ({"sinks": [{"to": "syslog"}]}, ("sinks", 0, "to"), "syslog without its address"),
        ({"sinks": [{"to": "stderr", "path": "/x"}]}, ("sinks", 0, "path"), "a sink to stderr has no path"),
        ({"sinks": [{"to": "file", "path": "/x", "tag": "y"}]}, ("sinks", 0, "tag"), "a sink to file has no tag"),
        (
            {"sinks": [{"to": "syslog", "address": "unix:/x", "format": "json"}]},
            ("sinks", 0, "format"), "a sink to syslog has no format",
        ),
        ({"sinks": [{"to": "syslog", "address": "tcp://x:1"}]}, ("sinks", 0, "address"), "is not udp://"),
        (
            {"sinks": [{"to": "syslog", "address": "unix:/x", "facility": "post"}]},
            ("sinks", 0, "facility"), "'post' is not a facility",
        ),
        ({"sinks": [{"to": "syslog", "address": "unix:/x", "tag": "a b"}]}, ("sinks", 0, "tag"), "pattern"),
        ({"sinks": [{"to": "syslog", "address": "unix:/x", "hostname": "a b"}]}, ("sinks", 0, "hostname"), "pattern"),
    ],
)  # fmt: skip
def test_what_is_refused(log: dict[str, object], where: tuple[object, ...], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Log.model_validate(log)
    (error,) = caught.value.errors()
    assert error["loc"] == where and said in error["msg"]


@pytest.mark.parametrize("written", [False, "off", ""])
def test_a_host_name_may_be_left_out(written: object) -> None:
    sink = {"to": "syslog", "address": "udp://127.0.0.1", "hostname": written}
    assert Log.model_validate({"sinks": [sink]}).sinks[0].hostname == ""


def test_what_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(Stream, "close", lambda self: closed.append(self))
    sinks = [{"to": "file", "path": f"{tmp_path}/x"}, {"to": "file", "path": f"{tmp_path}/none/x"}]
    with pytest.raises(FileNotFoundError) as caught:
        opened(tmp_path, sinks=sinks)
    assert caught.value.filename == f"{tmp_path}/none/x" and len(closed) == 1

    def unknown(*_: object, **__: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(OSError, match="not known") as other:
        opened(tmp_path, sinks=[{"to": "syslog", "address": "udp://log.example"}])
    assert other.value.filename == "udp://log.example"
