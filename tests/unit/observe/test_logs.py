"""The log: shape of a record, escapes, secrets, failures to write."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Formatter

import pytest

from gateway.observe import logs
from gateway.observe.records import RECORDS, undeclared
from gateway.observe.sinks import Stream

Read = Callable[[], list[str]]


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "log"
    logs.configure("json", "debug", file=str(path))
    yield path
    logs.forget_secrets()
    logs.configure("json", "info")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_record_in_json(log_file: Path) -> None:
    logs.get_logger("gateway.x").bind(pipeline="p").warning("refusal", client="192.0.2.1", size=3, user=None, to=["a"])
    record = json.loads(log_file.read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert record == {
        "level": "warning", "logger": "gateway.x", "record": "refusal", "pipeline": "p", "client": "192.0.2.1",
        "size": 3, "to": ["a"],
    }  # fmt: skip
    assert list(json.loads(log_file.read_text()))[:4] == ["time", "level", "logger", "record"]


@pytest.mark.parametrize("format", ["json", "text"])
def test_a_client_cannot_forge_lines_or_drive_the_terminal(log_file: Path, format: logs.Format) -> None:
    logs.configure(format, file=str(log_file))
    hostile = "a\r\n2026 INFO auth\x1b[2J\x00\x7f\x9b\u202e\u2028z"
    try:
        raise ValueError(hostile)
    except ValueError:
        logs.get_logger("x").exception("internal_error", helo=hostile, nested=[{hostile: hostile}], raw=b"\xff\x1b")
    text = log_file.read_text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", text)
    if format == "json":
        (line,) = lines(log_file)
        record = json.loads(line)
        assert record["helo"] == hostile
        assert record["nested"] == [{hostile: hostile}]
        assert record["raw"] == "\\xff\x1b"
        assert "ValueError" in record["exception"]
    else:
        assert all(line.startswith("    ") for line in lines(log_file)[1:])


@pytest.mark.parametrize("format", ["json", "text"])
def test_unusual_values_are_logged_all_the_same(log_file: Path, format: logs.Format) -> None:
    logs.configure(format, file=str(log_file))
    logs.get_logger("x").info(
        "warning", time=1, lone="\udcff", huge=2**80, error=OSError("gone"), path=log_file, keys={(1, 2): {3}}
    )
    (line,) = lines(log_file)
    assert "\\\\udcff" in line and str(2**80) in line and "gone" in line and "time_" in line


def test_level(log_file: Path) -> None:
    logger = logs.get_logger("x")
    logs.configure("json", "warning", file=str(log_file))
    logger.info("session")
    logger.warning("warning")
    logs.configure("json", "debug", file=str(log_file))
    logger.debug("session")
    assert [json.loads(line)["record"] for line in lines(log_file)] == ["warning", "session"]


@pytest.mark.parametrize("format", ["json", "text"])
def test_secrets_are_removed_everywhere(log_file: Path, format: logs.Format) -> None:
    logs.configure(format, file=str(log_file))
    secrets = ["hunter22", 'quo"te\\d', "pass\u00e9\u4e2d", "hunter22longer", "abc"]
    for secret in secrets:
        logs.register_secret(secret)
    try:
        raise RuntimeError(f"login with {secrets[0]} failed")
    except RuntimeError as error:
        logs.get_logger("x").exception(
            "stage_failure",
            a=f"x{secrets[1]}y", b=[{"k": secrets[2]}], error=error, c=secrets[3], d="abc", e="abcd", f=b"hunter22",
        )  # fmt: skip
    text = log_file.read_text()
    for secret in secrets[:4]:
        assert secret not in text and json.dumps(secret)[1:-1] not in text
    assert "abcd" in text and ("stage_failure" in text or "stage failure" in text)
    if format == "json":
        record = json.loads(text)
        assert (record["a"], record["c"], record["d"]) == ("x[redacted]y", "[redacted]", "[redacted]")
    assert logs.redact(f"<{secrets[0]}>") == "<[redacted]>"


def test_a_secret_that_is_a_word_of_ours_does_not_break_the_record(log_file: Path) -> None:
    logs.register_secret("info")
    logs.register_secret("record")
    logs.get_logger("x").info("session", helo="info record")
    record = json.loads(log_file.read_text())
    assert record["level"] == "info" and record["record"] == "session"
    assert record["helo"] == "[redacted] [redacted]"


def test_secrets_are_bounded() -> None:
    try:
        for i in range(logs.MAX_SECRETS):
            logs.register_secret(f"secret{i}")
        logs.register_secret("secret0")
        with pytest.raises(ValueError, match="secrets"):
            logs.register_secret("one more")
    finally:
        logs.forget_secrets()
    assert logs.redact("secret0") == "secret0"


def test_records_that_cannot_be_written_are_counted(log_file: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    logger = logs.get_logger("x")
    with os.fdopen(writer, "wb", buffering=0) as stream:
        logs.configure("json", stream=stream)  # type: ignore[arg-type]
        (sink,) = logs._routes.sinks()
        while not sink.lost:
            logger.info("session", helo="x" * 4000)
        logger.info("session", helo="x" * 4000)
        lost = sink.lost
        os.read(reader, 1 << 20)
        logger.info("session", helo="after")
        told, after = os.read(reader, 1 << 20).decode().splitlines()[-2:]
    os.close(reader)
    assert json.loads(told)["record"] == "lost_records" and json.loads(told)["count"] == lost >= 2
    assert json.loads(after)["helo"] == "after"


def test_reopen_follows_logrotate(log_file: Path, tmp_path: Path) -> None:
    logger = logs.get_logger("x")
    logger.info("start")
    log_file.rename(tmp_path / "old")
    logger.info("session")
    logs.reopen()
    logger.info("stop")
    assert len(lines(tmp_path / "old")) == 2 and len(lines(log_file)) == 1


def test_a_file_that_cannot_be_opened_changes_nothing(log_file: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        logs.configure(file=str(tmp_path / "missing" / "log"))
    logs.get_logger("x").info("stop")
    assert len(lines(log_file)) == 1


Where = Callable[[str], list[str]]


@pytest.fixture
def where(log_file: Path, tmp_path: Path) -> Where:
    """Logs to three files; the names of the records in one of them."""
    files = {name: str(tmp_path / name) for name in ("process", "all", "errors", "own")}
    shared = [Stream("json", "debug", file=files["all"]), Stream("text", "error", file=files["errors"])]
    logs.route(
        [Stream("json", "info", file=files["process"])], {"mx": shared},
        {("mx", "own"): [Stream("json", "notice", file=files["own"])]},
    )  # fmt: skip
    return lambda name: [line.split("record")[-1].split('"')[2] for line in lines(Path(files[name]))]


def test_records_go_where_their_pipeline_says(where: Where, tmp_path: Path) -> None:
    log = logs.get_logger("x")
    log.info("stop")
    log.debug("start", pipeline="submission")
    log.debug("start", pipeline="mx")
    log.bind(pipeline="mx").error("users_file", file="/x")
    assert (where("process"), where("all")) == (["stop"], ["start", "users_file"])
    (line,) = lines(tmp_path / "errors")
    assert line.endswith("users file /x could not be read, pipeline: mx")


def test_a_task_says_once_whose_it_is(where: Where, tmp_path: Path) -> None:
    """And so do the tasks that it starts; what is around it does not change."""
    log = logs.get_logger("x")

    async def session(pipeline: str, listener: str) -> None:
        logs.pipeline.set(pipeline)
        logs.listener.set(listener)
        log.info("session")
        await asyncio.create_task(warn())

    async def warn() -> None:
        log.warning("warning", text="x")

    async def serve() -> None:
        await asyncio.gather(session("mx", "other"), session("mx", "own"), session("submission", "own"))
        log.info("stop")

    asyncio.run(serve())
    assert where("all") == ["session", "warning"] and where("own") == ["warning"]
    assert where("process") == ["session", "warning", "stop"]
    assert json.loads(lines(tmp_path / "own")[0])["pipeline"] == "mx"
    assert "pipeline" not in json.loads(lines(tmp_path / "process")[-1])


def test_one_record_is_made_once_for_the_sinks_of_a_form(log_file: Path, tmp_path: Path) -> None:
    made = []

    def render(record: dict[str, object], now: float) -> bytes:
        made.append(record["record"])
        return b"x"

    sinks = [Stream(file=str(tmp_path / name)) for name in "abc"]
    for sink in sinks:
        sink.render = render
    logs.route(sinks)
    logs.get_logger("x").info("stop")
    assert made == ["stop"] and [lines(tmp_path / name) for name in "abc"] == [["x"]] * 3


def test_all_files_are_opened_again(where: Where, tmp_path: Path) -> None:
    """Even if one cannot be."""
    for name in ("process", "all"):
        (tmp_path / name).unlink()
    (tmp_path / "process").mkdir()
    with pytest.raises(IsADirectoryError):
        logs.reopen()
    logs.get_logger("x").info("stop", pipeline="mx")
    assert where("all") == ["stop"]


def test_the_end_says_what_was_lost(log_file: Path) -> None:
    (sink,) = logs._routes.sinks()
    sink.lost, sink.error = 3, "No space left on device"
    logs.close()
    assert json.loads(log_file.read_text())["count"] == 3
    assert [type(one) for one in logs._routes.sinks()] == [Stream]


def test_every_record_in_the_source_is_in_the_table() -> None:
    """Calls such as `log.info("name", key=...)` in gateway/ and stages/."""
    root = Path(logs.__file__).parents[2]
    problems, seen = [], set()
    for path in [*(root / "gateway").rglob("*.py"), *(root / "stages").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(ast.Attribute(logger, method), [ast.Constant(str(name)), *_], keywords) if (
                    method in logs.LEVELS and ast.unparse(logger).endswith("log")
                ):
                    seen.add(name)
                    keys = [keyword.arg or "**" for keyword in keywords if keyword.arg != "exc_info"]  # logging's own
                    missing = undeclared({"record": name, **dict.fromkeys(keys, "")})
                    problems += [f"{path.name}:{node.lineno}: {what}" for what in missing]
    assert not problems
    assert {"session", "refusal", "auth_failure"} <= seen


def test_the_table_of_records() -> None:
    for name, spec in RECORDS.items():
        assert spec.help.endswith("."), name
        assert all(text.endswith(".") for text in spec.keys.values()), name
        assert not {"time", "level", "logger", "record", "event"} & set(spec.keys), name
        assert {key for _, key, _, _ in Formatter().parse(spec.text) if key} <= set(spec.keys), name
    assert undeclared({"record": "auth", "time": "", "client": ""}) == []
    assert undeclared({"record": "auth", "password": ""}) == ["auth.password"]
    assert undeclared({"record": "nonsense"}) == ["nonsense"]
