"""How a pymilter class is found, and how an instance of it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
from pydantic import ValidationError

from gateway import AppendHeader, Edit, Refuse, Reply, Session
from gateway.protocol.milter import Action
from gateway.testing.conformance import check_stage
from gateway.testing.messages import edited, make_message
from gateway.testing.stages import FakeWorker, build, make_recipient, make_session, make_transaction
from stages.pymilter import Pymilter
from tests.unit.stages.pymilter_filters import (
    CONTENT,
    EXAMPLES,
    Gate,
    Milter,
    Recorder,
    envelope,
    fresh,
    milter,
    names,
    started,
    whole,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fresh()


# How a class is found


@pytest.mark.parametrize(
    ("source", "name", "error"),
    [
        ("", "nothing", "names no class; write package.module:Class"),
        ("", "a-b:Class", "names no class"),
        ("", "{}:Missing", "has no Missing"),
        ("class Filters: pass", "{}:Filter", "has no Filter; did you mean 'Filters'?"),
        ("class Filter: pass", "{}:Filter", "is no filter class; write one that inherits from Milter.Base"),
        ("Filter = 5", "{}:Filter", "is no filter class"),
        ("import no_such_thing", "{}:Filter", "cannot be imported: No module named 'no_such_thing'; install it"),
        ("1 / 0", "{}:Filter", "cannot be imported: ZeroDivisionError"),
        ("import sys; sys.exit('usage')", "{}:Filter", "cannot be imported: SystemExit: usage"),
        ("import Milter; Milter.runmilter('x', 'y')", "{}:Filter", "runs its daemon; put that below if __name__"),
        ("", "no_such_module_here:Filter", "No module named 'no_such_module_here'"),
        ("", "json:Filter", "not a file in path; give it another name"),
    ],
)
def test_classes_that_cannot_be_had(
    tmp_path: Path, request: pytest.FixtureRequest, source: str, name: str, error: str
) -> None:
    module = f"filter_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(source)
    with pytest.raises(ValidationError) as caught:
        build(Pymilter, {"class": name.format(module), "path": str(tmp_path)})
    assert error in str(caught.value)


def test_settings_that_are_none(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"path": str(tmp_path / "none")}, "is no folder"),
        ({"quarantine": "hold"}, "'hold' is not what can become of a message; write refuse, header or route:<pool>"),
        ({"quarantine": "route:"}, "is not what can become of a message"),
        ({"threads": 0}, "greater than or equal to 1"),
    ]
    for settings, error in cases:
        with pytest.raises(ValidationError, match=error):
            build(Pymilter, {"class": f"{Recorder.__module__}:Recorder", **settings})


def test_without_pymilter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "Milter", None)
    with pytest.raises(ValidationError, match=r"pymilter is not installed .*; pip install 'mail-gateway\[milter\]'"):
        build(Pymilter, f"{Recorder.__module__}:Recorder")


def test_flags_are_those_of_the_own_module(tmp_path: Path) -> None:
    """Two modules set flags for the whole process, as they think; a third sets none. Nothing of it is left."""
    source = "import Milter\nfrom Milter import ADDHDRS, set_flags\nclass Filter(Milter.Base):\n  def data(self): return 0\n"
    (tmp_path / "flags_one.py").write_text(source + "set_flags(ADDHDRS)\n")
    (tmp_path / "flags_two.py").write_text(source + "Milter.set_flags(0)\n")
    (tmp_path / "flags_three.py").write_text(source)
    before = (Milter.set_flags, milter.set_flags, Milter.runmilter)
    expected = {"flags_one": Action.ADDHDRS, "flags_two": Action(0), "flags_three": Action(0x1FF)}
    for _ in range(2):  # imported once, known twice
        for module, actions in expected.items():
            stage = build(Pymilter, {"class": f"{module}:Filter", "path": str(tmp_path)})
            assert stage._offered == actions | Action.SETSYMLIST
            assert stage.edits(make_transaction(make_session())) == ("any" if actions else "none")
    assert (Milter.set_flags, milter.set_flags, Milter.runmilter) == before


def test_flags_of_a_module_that_another_one_imported_first(tmp_path: Path) -> None:
    filter_class = "class Filter(Milter.Base):\n  pass\n"
    (tmp_path / "flags_base.py").write_text(f"import Milter\nMilter.set_flags(Milter.ADDHDRS)\n{filter_class}")
    (tmp_path / "flags_user.py").write_text(f"import Milter, flags_base\nMilter.set_flags(0)\n{filter_class}")
    for module, actions in (("flags_user", Action(0)), ("flags_base", Action.ADDHDRS)):
        stage = build(Pymilter, {"class": f"{module}:Filter", "path": str(tmp_path)})
        assert stage._offered == actions | Action.SETSYMLIST


async def test_a_class_and_its_subclass_in_one_gateway() -> None:
    """pymilter keeps what it finds out of a class in the class, where a subclass would find it."""

    class Parent(Milter.Base):  # type: ignore[misc]
        pass

    class Child(Parent):
        def connect(self, hostname: str, family: int, hostaddr: Any) -> int:
            return int(Milter.CONTINUE)

    globals().update(Parent=Parent, Child=Child)
    assert "connect" not in (await started(Parent)).phases()
    assert "connect" in (await started(Child)).phases()
    assert not hasattr(Parent, "_protocol_mask")


async def test_keeps_the_contract() -> None:
    await check_stage(Pymilter, f"{Recorder.__module__}:Recorder")
    await check_stage(Pymilter, {"class": f"{Recorder.__module__}:Bare", "quarantine": "route:held", "read_only": True})

# How messages and sessions end


async def test_abort_and_close() -> None:
    stage = await started()
    session = make_session(helo="x")
    first = (await envelope(stage, session)).transaction
    stage.reset(session, first)
    stage.reset(session, first)
    await envelope(stage, session)  # nobody told of its end
    second = (await envelope(stage, session)).transaction
    stage.close(session)
    stage.reset(session, second)
    await stage.stop()
    message = ["envfrom", "envrcpt", "data", "abort"]
    assert names() == ["connect", "hello", *message, *message, *message, "close"]


async def test_what_abort_and_close_raise_is_logged() -> None:
    with structlog.testing.capture_logs() as logs:
        stage = await started()
        Recorder.does["abort"] = Recorder.does["close"] = lambda to: 1 // 0
        session = make_session(helo="x")
        stage.reset(session, (await envelope(stage, session)).transaction)
        stage.close(session)
        await stage.stop()
    assert [(one["event"], one["phase"], one["error"].split(":")[0]) for one in logs] == [
        ("stage_failure", "abort", "ZeroDivisionError"), ("stage_failure", "close", "ZeroDivisionError"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "error"),
    [("connect", OSError), ("envfrom", OSError), ("envrcpt", OSError), ("body", StopIteration), ("eom", SystemExit)],
)
async def test_exceptions(name: str, error: type[BaseException]) -> None:
    stage = await started()

    def fail(to: Recorder) -> None:
        raise error("boom")

    Recorder.does[name] = fail
    session = make_session(helo="x")
    with pytest.raises(Exception, match="boom"):
        await whole(stage, session=session)
    assert names()[-1] == name
    transaction = session.transaction
    assert transaction is not None
    stage.on_error = "pass"
    if name != "envrcpt":
        assert await stage.rcpt(session, make_recipient(session)) is None
        assert await stage.message(session, make_message(session, CONTENT)) is None
        assert [one for one in names() if one != "close"][-1] == name
    Recorder.does.clear()
    stage.reset(session, transaction)
    assert await whole(stage, session=session) is None
    assert len(Recorder.made) == (2 if name == "connect" else 1)
    assert ("abort" in names()) is (name == "envrcpt")


@pytest.mark.parametrize("on_error", ["tempfail", "pass"])
@pytest.mark.parametrize("mode", ["enforce", "observe"])
@pytest.mark.parametrize("name", ["connect", "hello", "envfrom", "data", "header", "body"])
async def test_what_failed_is_said_once_where_the_message_goes_on(name: str, mode: str, on_error: str) -> None:
    """Else it is the answer to all that follows of the message. The next one is asked about again."""
    stage = await started()
    stage.mode, stage.on_error = mode, on_error  # type: ignore[assignment]
    session = make_session(helo="client.example")
    Recorder.does[name] = lambda to: 1 // 0
    transaction = make_transaction(session)
    failures: list[str] = []
    passed = set()

    async def ask(*phases: tuple[str, Callable[[], Awaitable[object]]]) -> None:
        """As the chain asks a stage with a condition: what it missed and did not pass yet, up to a failure."""
        for phase, call in phases:
            if phase in passed:
                continue
            try:
                assert await call() is None
            except (ZeroDivisionError, RuntimeError):
                failures.append(phase)
                return
            if phase != "rcpt":
                passed.add(phase)

    for _ in range(3):
        await ask(
            ("connect", lambda: stage.connect(session)),
            ("helo", lambda: stage.helo(session, session.helo)),
            ("mail", lambda: stage.mail(session, transaction)),
            ("rcpt", lambda: stage.rcpt(session, make_recipient(session))),
        )
    await ask(("data", lambda: stage.data(session, transaction)))
    await ask(("message", lambda: stage.message(session, make_message(session, CONTENT))))
    goes_on = mode == "observe" or on_error == "pass"
    assert (len(failures) == 1) is (goes_on or name in ("header", "body")), failures
    assert stage.edits(transaction) == "none"
    stage.reset(session, transaction)
    Recorder.does.clear()
    assert await whole(stage, session=session) is None


async def test_an_instance_that_hangs_is_given_up() -> None:
    Gate.opened, Gate.entered = threading.Event(), threading.Event()
    stage = await started(Gate, threads=2)
    session = make_session(helo="client.example")
    await stage.connect(session)
    await stage.helo(session, "client.example")
    Recorder.does["envrcpt"] = lambda to: to.wait()
    transaction = make_transaction(session)
    await stage.mail(session, transaction)
    hanging = asyncio.ensure_future(stage.rcpt(session, make_recipient(session)))
    await asyncio.to_thread(Gate.entered.wait)
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    Recorder.does.clear()
    stage.on_error = "pass"  # the message goes on without it
    assert stage.edits(transaction) == "none"
    assert await stage.rcpt(session, make_recipient(session)) is None
    assert await stage.message(session, make_message(session, CONTENT)) is None
    stage.reset(session, transaction)
    assert names() == ["connect", "hello", "envfrom", "envrcpt"]
    assert await stage.mail(session, make_transaction(session)) is None
    assert names()[4:] == ["connect", "hello", "envfrom"]
    assert len(Recorder.made) == 2
    Gate.opened.set()
    stage.close(session)
    await stage.stop()
    assert sorted(names()[7:]) == ["abort", "abort", "close", "close"]


@pytest.mark.parametrize("on_error", ["tempfail", "pass"])
async def test_a_command_that_it_hangs_in_does_not_let_the_message_through(on_error: str) -> None:
    Gate.opened, Gate.entered = threading.Event(), threading.Event()
    stage = await started(Gate)
    session = make_session(helo="client.example")
    message = await envelope(stage, session)
    Recorder.does["unknown"] = lambda to: to.wait()
    hanging = asyncio.ensure_future(stage.unknown(session, "FOO"))
    await asyncio.to_thread(Gate.entered.wait)
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    stage.on_error = on_error  # type: ignore[assignment]
    if on_error == "pass":
        assert await stage.message(session, message) is None
    else:
        with pytest.raises(RuntimeError, match="failed earlier"):
            await stage.message(session, message)
    Gate.opened.set()
    stage.close(session)
    await stage.stop()


async def test_sessions_at_the_same_time() -> None:
    """Two threads serve four sessions; a session's callbacks are never two at once."""
    running: dict[int, int] = {}
    most = [0]
    lock = threading.Lock()

    def busy(to: Recorder) -> None:
        with lock:
            running[id(to)] = running.get(id(to), 0) + 1
            most[0] = max(most[0], sum(running.values()))
            assert running[id(to)] == 1
        threading.Event().wait(0.001)
        with lock:
            running[id(to)] -= 1

    stage = await started(threads=2)
    for name in ("envfrom", "header", "body", "abort"):
        Recorder.does[name] = busy
    sessions = [make_session(helo=f"{number}.example") for number in range(4)]

    async def talk(session: Session) -> None:
        for _ in range(3):
            message = await envelope(stage, session, block=10)
            await stage.message(session, message)
            stage.reset(session, (await envelope(stage, session)).transaction)
        stage.close(session)

    await asyncio.gather(*(talk(session) for session in sessions))
    await stage.stop()
    assert len(Recorder.made) == 4 and names().count("close") == 4 and names().count("abort") == 12
    assert most[0] <= 2

# The example


@pytest.mark.parametrize(
    ("subject", "refused"),
    [(b"hello", False), (b"Casino night", True), (b"=?utf-8?b?Q2FzaW5v?=", True), (b"=?nonsense?q?x?=", False)],
)
async def test_the_example_refuses(subject: bytes, refused: bool) -> None:
    stage = build(Pymilter, {"class": "milter_filter:Filter", "path": str(EXAMPLES)})
    await stage.start(FakeWorker())
    verdict = await whole(stage, b"Subject: " + subject + b"\r\n\r\ntext\r\n")
    if refused:
        assert isinstance(verdict, Refuse) and verdict.reply == Reply(550, (b"5.7.1 we take no mail about casino",))
    else:
        assert verdict == Edit([AppendHeader("X-Filtered-By", "gateway.example")])


async def test_the_example_replaces_the_footer() -> None:
    stage = build(Pymilter, {"class": "milter_filter:Filter", "path": str(EXAMPLES)})
    await stage.start(FakeWorker())
    content = b"Subject: hi\r\n\r\ntext\r\n-- \r\nSent by the old mail system.\r\n"
    session = make_session(helo="x")
    for _ in range(2):
        edit = await whole(stage, content, session)
        assert edited(content, edit) == (
            b"Subject: hi\r\nX-Filtered-By: gateway.example\r\n\r\n"
            b"text\r\n-- \r\nExample Ltd, 1 Example Street, Exampleton\r\n"
        )
    large = b"Subject: hi\r\n\r\n" + b"x" * 998 * 1100 + content
    assert isinstance(edit := await whole(stage, large, session), Edit) and len(edit.operations) == 1
