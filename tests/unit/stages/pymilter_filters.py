"""Filter classes for the tests of the stage `pymilter`, and what asks them; skips a test module without pymilter."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gateway import Session
from gateway.testing.messages import FakeMessage, make_message
from gateway.testing.stages import FakeWorker, build, make_recipient, make_session, make_transaction
from stages.pymilter import Pymilter
from tests.peers.require import missing

if importlib.util.find_spec("Milter") is None:
    try:
        missing("pymilter is not installed")
    except pytest.skip.Exception as skipped:
        pytest.skip(str(skipped), allow_module_level=True)

import Milter
import milter
from Milter import testctx

__all__ = [
    "CONTENT", "EXAMPLES", "Bare", "Chosen", "Do", "Gate", "LeadingSpace", "Milter", "Recorder", "envelope", "fresh",
    "milter", "names", "started", "testctx", "whole",
]  # fmt: skip

EXAMPLES = Path(__file__).parents[3] / "examples"
CONTENT = b"Subject: one\r\n two\r\nX-Tab:\tvalue\r\nX-None:\r\n\r\nfirst line\r\nsecond line\r\n"

Do = Callable[["Recorder"], object]


class Recorder(Milter.Base):  # type: ignore[misc]
    """Records every event; `does` says what it does in one, and what it answers."""

    events: ClassVar[list[tuple[Any, ...]]] = []
    does: ClassVar[dict[str, Do]] = {}
    made: ClassVar[list[Recorder]] = []

    def __init__(self) -> None:
        self.made.append(self)

    def _event(self, name: str, *arguments: Any) -> Any:
        self.events.append((name, *arguments))
        do = self.does.get(name)
        answer = do(self) if do is not None else None
        return Milter.CONTINUE if answer is None else answer

    def connect(self, hostname: str, family: int, hostaddr: Any) -> Any:
        return self._event("connect", hostname, family, hostaddr)

    def hello(self, hostname: str) -> Any:
        return self._event("hello", hostname)

    def envfrom(self, f: str, *params: str) -> Any:
        return self._event("envfrom", f, *params)

    def envrcpt(self, to: str, *params: str) -> Any:
        return self._event("envrcpt", to, *params)

    def data(self) -> Any:
        return self._event("data")

    def header(self, field: str, value: str) -> Any:
        return self._event("header", field, value)

    def eoh(self) -> Any:
        return self._event("eoh")

    def body(self, block: bytes) -> Any:
        return self._event("body", block)

    def eom(self) -> Any:
        return self._event("eom")

    def unknown(self, command: str) -> Any:
        return self._event("unknown", command)

    def abort(self) -> Any:
        return self._event("abort")

    def close(self) -> Any:
        return self._event("close")


@Milter.header_leading_space
class LeadingSpace(Recorder):
    """Sees and writes the blank behind the colon."""


class Bare(Milter.Base):  # type: ignore[misc]
    """Has no callback but eom."""

    seen: ClassVar[list[tuple[str, str, str]]] = []

    def eom(self) -> Any:
        self.seen.append((self.getsymval("i"), self.getsymval("{rcpt_addr}"), self.getsymval("client_addr")))
        return Milter.CONTINUE


class Chosen(Recorder):
    """Takes what it does without by decorators, and what it may by negotiate."""

    def negotiate(self, opts: list[int]) -> Any:
        opts[0] = Milter.ADDHDRS | Milter.SETSYMLIST
        return super().negotiate(opts)

    @Milter.nocallback  # type: ignore[untyped-decorator]
    def hello(self, hostname: str) -> Any:
        return self._event("hello", hostname)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def data(self) -> Any:
        return self._event("data")

    @Milter.symlist("{auth_authen}", "i")  # type: ignore[untyped-decorator]
    def eom(self) -> Any:
        return self._event("eom")

class Gate(Recorder):
    """Waits in a callback until the test opens it."""

    opened: ClassVar[threading.Event]
    entered: ClassVar[threading.Event]

    def wait(self) -> None:
        self.entered.set()
        assert self.opened.wait(30)

def fresh() -> None:
    """Forget what the classes saw and were told to do."""
    Recorder.events.clear()
    Recorder.does.clear()
    Recorder.made.clear()
    Bare.seen.clear()


async def started(filter_class: type = Recorder, **settings: object) -> Pymilter:
    """A stage with the class."""
    stage = build(Pymilter, {"class": f"{filter_class.__module__}:{filter_class.__name__}", **settings})
    await stage.start(FakeWorker())
    return stage


async def envelope(stage: Pymilter, session: Session, content: bytes = CONTENT, block: int = 65536) -> FakeMessage:
    """A transaction up to DATA that nobody minded."""
    transaction = make_transaction(session, "a@example.org", (("SIZE", "100"), ("SMTPUTF8", None)))
    assert await stage.mail(session, transaction) is None
    assert await stage.rcpt(session, make_recipient(session, "b@example.net", (("NOTIFY", "NEVER"),))) is None
    if "data" in stage.phases():
        assert await stage.data(session, transaction) is None
    return make_message(session, content, block=block)


async def whole(stage: Pymilter, content: bytes = CONTENT, session: Session | None = None) -> Any:
    """What the stage answers to a message in a session of its own."""
    session = session or make_session(helo="client.example")
    return await stage.message(session, await envelope(stage, session, content))


def names() -> list[str]:
    return [event[0] for event in Recorder.events]
