"""What a pymilter class may change of a message, and the threads in which it does."""

from __future__ import annotations

import asyncio
import io
import threading
import weakref
from typing import Any

import pytest

from gateway import (
    AddHeader,
    AddRecipient,
    AppendHeader,
    Cause,
    ChangeHeader,
    ChangeSender,
    DeleteHeader,
    Edit,
    InsertHeader,
    Refuse,
    RemoveRecipient,
    ReplaceBody,
    Upstream,
)
from gateway.testing.messages import FakeMessage, edited
from gateway.testing.stages import make_session, make_transaction
from stages.pymilter_context import Threads, Turns
from tests.unit.stages.pymilter_filters import (
    CONTENT,
    Chosen,
    Do,
    Milter,
    Recorder,
    envelope,
    fresh,
    milter,
    started,
    testctx,
    whole,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fresh()


# What it may change


@pytest.mark.parametrize(
    ("do", "operations"),
    [
        (lambda to: to.addheader("X-A", "v"), [AppendHeader("X-A", "v")]),
        (lambda to: to.addheader("X-A", "a\n\tb\r\n c\n"), [AppendHeader("X-A", "a\r\n\tb\r\n c")]),
        *((lambda to, at=at: to.addheader("X-A", "v", at), [InsertHeader(at, "X-A", "v", below_trace=True)])
          for at in (0, 1, 7)),
        (lambda to: to.chgheader("Subject", 2, "v"), [ChangeHeader("Subject", "v", 2)]),
        (lambda to: to.chgheader("Subject", 0, "v"), [ChangeHeader("Subject", "v", 1)]),
        (lambda to: to.chgheader("Subject", 0, ""), [DeleteHeader("Subject", 1)]),
        (lambda to: to.chgheader("Subject", 3, None), [DeleteHeader("Subject", 3)]),
        (lambda to: to.addrcpt("<c@example.net>"), [AddRecipient("c@example.net")]),
        (lambda to: to.addrcpt("c@example.net", "NOTIFY=NEVER"), [AddRecipient("c@example.net", (("NOTIFY", "NEVER"),))]),
        (lambda to: to.delrcpt("<b@example.net>"), [RemoveRecipient("b@example.net")]),
        (lambda to: to.chgfrom("<>"), [ChangeSender("")]),
        (lambda to: to.chgfrom("<n@example.org>", "RET=HDRS"),
         [ChangeSender("n@example.org", (("SIZE", "100"), ("SMTPUTF8", None), ("RET", "HDRS")))]),
        (lambda to: to.chgfrom("<n@example.org>", "SIZE=1 BODY=8BITMIME"), [ChangeSender("n@example.org")]),
        (lambda to: to.addrcpt("c@example.net", "X-A=1"), [AddRecipient("c@example.net")]),
        (lambda to: to.progress(), None),
    ],
)  # fmt: skip
async def test_edits(do: Do, operations: list[Any] | None) -> None:
    stage = await started()
    Recorder.does["eom"] = do
    assert await whole(stage) == (Edit(operations) if operations is not None else None)
    Recorder.does["eom"] = lambda to: [do(to)] and Milter.REJECT
    refuse = await whole(stage)
    assert isinstance(refuse, Refuse)
    Recorder.does.clear()
    assert await whole(stage) is None, "nothing is left of a message before"


@pytest.mark.parametrize(
    "do",
    [
        lambda to: to.addheader("", "v"),
        lambda to: to.addheader("X:Y", "v"),
        lambda to: to.addheader("X-A", "a\nBcc: c@example.net"),
        lambda to: to.addheader("X-A", "a\0b"),
        lambda to: to.chgheader("X-A", -1, "b"),
        lambda to: to.addrcpt("<c@example.net>\r\nDATA"),
        lambda to: to.addrcpt("<>"),
        lambda to: to.addrcpt("<c@example.net>", "NOTIFY=A B=\x01"),
        lambda to: to.delrcpt("<>"),
        lambda to: to.chgfrom("<a b@example.net>"),
        lambda to: to.quarantine(""),
        lambda to: to.setsymlist(Milter.M_EOM, "i"),
        lambda to: to._ctx.addheader(b"X-A", "v"),
        lambda to: to._ctx.addheader("X-A", b"v"),
    ],
)
async def test_edits_that_are_none_are_errors_of_the_filter(do: Do) -> None:
    stage = await started()
    Recorder.does["eom"] = do
    with pytest.raises((milter.error, ValueError, TypeError)):
        await whole(stage)


async def test_a_new_body_in_many_pieces() -> None:
    stage = await started()
    pieces = [b"line %d\n" % number * 1000 for number in range(100)]

    def replace(to: Recorder) -> None:
        assert threading.current_thread() is not threading.main_thread()
        for piece in pieces:
            to.replacebody(piece)
        to.replacebody("last")

    Recorder.does["eom"] = replace
    edit = await whole(stage)
    assert edited(CONTENT, edit).endswith(b"\r\n\r\n" + b"".join(pieces).replace(b"\n", b"\r\n") + b"last\r\n")
    Recorder.does["eom"] = lambda to: to.replacebody(b"")
    edit = await whole(stage)
    assert edited(CONTENT, edit).endswith(b"X-None:\r\n\r\n")


async def test_no_room_for_a_new_body() -> None:
    class Full(FakeMessage):
        def new_body(self) -> Any:
            class Body:
                def write(self, data: bytes) -> None:
                    raise OSError("no room")

            return Body()

    def replace(to: Recorder) -> None:
        for _ in range(2):
            try:
                to.replacebody(b"x" * 300_000)
            except OSError:
                to.log("does not care")

    stage = await started()
    Recorder.does["eom"] = replace
    session = make_session(helo="x")
    await envelope(stage, session)
    assert session.transaction is not None
    with pytest.raises(OSError, match="no room"):
        await stage.message(session, Full(session.transaction, CONTENT, 100))


@pytest.mark.parametrize("name", ["connect", "envfrom", "body"])
async def test_edits_outside_of_eom_are_errors(name: str) -> None:
    stage = await started()
    Recorder.does[name] = lambda to: to.addheader("X-A", "v")
    with pytest.raises(milter.error, match="not in eom"):
        await whole(stage)


async def test_edits_without_their_flag_are_errors() -> None:
    stage = await started(Chosen)  # negotiates ADDHDRS
    session = make_session(helo="x")
    await envelope(stage, session)
    assert session.transaction is not None and stage.edits(session.transaction) == "any"
    Recorder.does["eom"] = lambda to: to.chgheader("A", 1, "b")
    with pytest.raises(Milter.DisabledAction):
        await whole(stage)
    Recorder.does["eom"] = lambda to: to._ctx.chgheader("A", 1, "b")
    with pytest.raises(milter.error, match="CHGHDRS is not set"):
        await whole(stage)


async def test_the_same_edits_as_in_pymilters_own_harness() -> None:
    def edit(to: Recorder) -> None:
        to.addrcpt("<c@example.net>")
        to.addrcpt("<d@example.net>", "NOTIFY=NEVER")
        to.delrcpt("<b@example.net>")
        to.chgfrom("<n@example.org>")
        to.addheader("X-A", "v")
        to.replacebody(b"new ")
        to.replacebody(b"body\r\n")

    Recorder.does["eom"] = edit
    ctx = testctx.TestCtx()
    saved = list(testctx.TestCtx.default_opts)
    Milter.factory = type("Harnessed", (Recorder,), {})
    try:
        ctx._connect()
        ctx._feedFile(io.BytesIO(CONTENT.replace(b"\r\n", b"\n")), "a@example.org", "b@example.net")
    finally:
        testctx.TestCtx.default_opts[:] = saved
        Milter.factory = Milter.Milter
    verdict = await whole(await started())
    assert isinstance(verdict, Edit)
    added = [one for one in verdict.operations if isinstance(one, AddRecipient)]
    removed = [f"<{one.address}>" for one in verdict.operations if isinstance(one, RemoveRecipient)]
    (sender,) = [f"<{one.address}>" for one in verdict.operations if isinstance(one, ChangeSender)]
    assert [f"<{one.address}>" for one in added] == [address for address, _ in ctx._addrcpt]
    assert (removed, sender) == (ctx._delrcpt, ctx._sender)
    content = edited(CONTENT, verdict)
    assert content.partition(b"\r\n\r\n")[2] == ctx._body.getvalue().partition(b"\n\n")[2]
    assert ctx._msg["X-A"] == "v" and b"\r\nX-A: v\r\n\r\n" in content
    assert len([one for one in verdict.operations if isinstance(one, ReplaceBody)]) == 1


@pytest.mark.parametrize(
    ("setting", "verdict"),
    [
        ("refuse", Refuse(Cause.CONTENT, log="quarantine: bad?one")),
        ("header", Edit([AppendHeader("X-A", "v"), AddHeader("X-Quarantine", "bad?one")])),
        ("route:held", Edit([AppendHeader("X-A", "v")], Upstream("held"))),
    ],
)
async def test_quarantine(setting: str, verdict: object) -> None:
    stage = await started(quarantine=setting)
    Recorder.does["eom"] = lambda to: to.addheader("X-A", "v") or to.quarantine("bad\none")
    assert await whole(stage) == verdict
    Recorder.does["eom"] = lambda to: [to.quarantine("bad")] and Milter.TEMPFAIL
    assert await whole(stage) == Refuse(Cause.CONTENT, temporary=True, log="TEMPFAIL in eom")


async def test_read_only() -> None:
    for setting, edits in (("refuse", "none"), ("header", "none")):
        stage = await started(read_only=True, quarantine=setting)
        session = make_session(helo="x")
        message = await envelope(stage, session)
        assert stage.edits(message.transaction) == edits
        Recorder.does["eom"] = lambda to: to._ctx.addheader("X-A", "v")
        with pytest.raises(milter.error, match="ADDHDRS is not set"):
            await stage.message(session, message)
        assert stage.edits(make_transaction(session)) == edits

async def test_turns_that_were_taken_back_are_not_called() -> None:
    threads = Threads(1, "test")
    one, other = Turns(threads), Turns(threads)
    gate, called = threading.Event(), []
    first = one.ask(gate.wait)
    futures = [other.ask(lambda number=number: called.append(number)) for number in range(3)]  # type: ignore[misc]
    assert futures[1].cancel()
    gate.set()
    await asyncio.wrap_future(first)
    await asyncio.wrap_future(futures[2])
    threads.end(10)
    assert called == [0, 2]


async def test_nothing_is_kept_of_what_was_taken_back() -> None:
    """As long as filters hang in all threads, what other sessions gave up must not pile up behind them."""

    class Block:
        def read(self) -> None: ...

    threads = Threads(1, "test")
    gate = threading.Event()
    first = Turns(threads).ask(gate.wait)
    block, other = Block(), Turns(threads)
    kept = weakref.ref(block)
    future = other.ask(block.read)
    del block
    assert kept() is not None and future.cancel()
    assert kept() is None
    gate.set()
    await asyncio.wrap_future(first)
    threads.end(10)
