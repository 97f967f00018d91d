"""Each operation on a message that waits, by itself and in long rows, and that a verdict is carried out whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import (
    AddHeader,
    AddRecipient,
    AppendHeader,
    ChangeHeader,
    ChangeSender,
    DeleteHeader,
    InsertHeader,
    Operation,
    Recipient,
    RemoveRecipient,
    ReplaceBody,
    Transaction,
)
from gateway.frontend.draft import MAX_OPERATIONS, Draft, SpooledBody
from gateway.protocol.content import DotStuffer
from gateway.protocol.errors import LocalError
from gateway.protocol.headers import Header, HeaderField, parse_header
from gateway.relay.spool import Spool, SpoolSpace

HEAD = b"A: 1\r\nB: 2\r\nA: 3\r\n folded\r\n"
Make = Callable[..., Draft]


@pytest.fixture
def make() -> Iterator[Make]:
    """A draft of this content, for these recipients."""
    kept: list[tuple[Draft, Spool]] = []

    def made(content: bytes = HEAD + b"\r\nbody\r\n", *recipients: str, space: SpoolSpace | None = None) -> Draft:
        space = space or SpoolSpace()
        header, offset = parse_header(content)
        body, stuffer = Spool(space), DotStuffer()
        body.reader(waiting=True)
        body.write(stuffer.feed(content) + stuffer.finish())
        body.end()
        transaction = Transaction("1", "a@example.org", (("BODY", "8BITMIME"),))
        for index, address in enumerate(recipients):
            transaction.recipients.append(Recipient(address, (), index))
        draft = Draft(header, body, offset, transaction, space)
        kept.append((draft, body))
        return draft

    yield made
    for draft, body in kept:
        draft.close()
        body.close()
        assert draft.space.used == 0
        assert all(body.spool._closed for body in draft.bodies)


OWN = [AddHeader("Received", "own")]
HEADERS: list[tuple[str, list[Operation], str]] = [
    ("add", [AddHeader("X", "1"), AddHeader("X", "2")], "X:2 X:1 | A:1 B:2 A:3"),
    ("append", [AppendHeader("X", "1"), AppendHeader("X", "2")], "| A:1 B:2 A:3 X:1 X:2"),
    ("insert first", [InsertHeader(0, "X", "1")], "| X:1 A:1 B:2 A:3"),
    ("insert", [InsertHeader(1, "X", "1"), InsertHeader(3, "X", "2")], "| A:1 X:1 B:2 X:2 A:3"),
    ("insert last", [InsertHeader(3, "X", "1")], "| A:1 B:2 A:3 X:1"),
    ("insert behind", [InsertHeader(9, "X", "1")], "| A:1 B:2 A:3 X:1"),
    ("insert before", [InsertHeader(-1, "X", "1")], "| X:1 A:1 B:2 A:3"),
    ("insert between those above", [AddHeader("X", "1"), AddHeader("X", "2"), InsertHeader(1, "Y", "")],
     "X:2 Y: X:1 | A:1 B:2 A:3"),
    ("insert below those above", [AddHeader("X", "1"), InsertHeader(1, "Y", "")], "X:1 | Y: A:1 B:2 A:3"),
    ("trace 0", [InsertHeader(0, "X", "1", below_trace=True)], "X:1 | A:1 B:2 A:3"),
    ("trace 1", [InsertHeader(1, "X", "1", below_trace=True)], "| X:1 A:1 B:2 A:3"),
    ("trace 2", [InsertHeader(2, "X", "1", below_trace=True)], "| A:1 X:1 B:2 A:3"),
    ("trace 0 and 1", [InsertHeader(0, "X", "1", below_trace=True), InsertHeader(1, "Y", "", below_trace=True)],
     "X:1 Y: | A:1 B:2 A:3"),
    ("trace 0 and 2", [InsertHeader(0, "X", "1", below_trace=True), InsertHeader(2, "Y", "", below_trace=True)],
     "X:1 | Y: A:1 B:2 A:3"),
    ("trace 9", [InsertHeader(9, "X", "1", below_trace=True)], "| A:1 B:2 A:3 X:1"),
    ("change", [ChangeHeader("a", "x", 2)], "| A:1 B:2 a:x"),
    ("change none", [ChangeHeader("a", "x", 3)], "| A:1 B:2 A:3 a:x"),
    ("change 0", [ChangeHeader("b", "x", 0)], "| A:1 b:x A:3"),
    ("change one above", [AddHeader("B", "0"), ChangeHeader("B", "x", 1)], "B:x | A:1 B:2 A:3"),
    ("delete", [DeleteHeader("a", 2)], "| A:1 B:2"),
    ("delete none", [DeleteHeader("a", 3), DeleteHeader("x"), DeleteHeader("a", -1)], "| A:1 B:2 A:3"),
    ("delete all", [DeleteHeader("A", 0)], "| B:2"),
    ("delete counts anew", [DeleteHeader("A", 1), DeleteHeader("A", 1), DeleteHeader("A", 1)], "| B:2"),
    ("delete above", [AddHeader("X", "1"), AddHeader("Y", "2"), DeleteHeader("X")], "Y:2 | A:1 B:2 A:3"),
    ("delete and add", [DeleteHeader("A", 0), AddHeader("A", "9"), ChangeHeader("A", "8", 1)], "A:8 | B:2"),
    ("everything", [DeleteHeader("A", 0), DeleteHeader("B"), AppendHeader("C", "")], "| C:"),
]  # fmt: skip


@pytest.mark.parametrize(("operations", "shown"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_header(make: Make, operations: list[Operation], shown: str, one_by_one: bool) -> None:
    """Beside `|` stand the fields of the gateway's own; several verdicts do what one does."""
    draft = make()
    for verdict in [[one] for one in operations] if one_by_one else [operations]:
        draft.apply(verdict)
    above, _, below = shown.partition("|")
    for own, expected in ([], (above + below).split()), (OWN, [*above.split(), "Received:own", *below.split()]):
        header, offset = parse_header(draft.head(own))
        assert [f"{field.name}:{field.text.partition(' ')[0]}" for field in header.fields] == expected
        assert draft.head(own)[offset:] == b"" and header.end == b"\r\n"
    if not any(isinstance(one, ChangeHeader | DeleteHeader) for one in operations):
        assert b"A: 3\r\n folded\r\n" in draft.head(())


NAMES = st.sampled_from(["A", "a", "B", "C"])
OPERATIONS = st.lists(
    st.one_of(
        st.builds(AddHeader, NAMES, st.just("x")),
        st.builds(AppendHeader, NAMES, st.just("y")),
        st.builds(InsertHeader, st.integers(0, 8), NAMES, st.just("z")),
        st.builds(ChangeHeader, NAMES, st.just("c"), st.integers(0, 4)),
        st.builds(DeleteHeader, NAMES, st.integers(1, 4)),
    ),
    max_size=30,
)


@given(OPERATIONS)
def test_long_rows_do_what_the_header_does(operations: list[Operation]) -> None:
    """`Header` looks through its fields for each change; the draft, which does not, comes to the same."""
    slow = parse_header(HEAD + b"\r\n")[0]
    body = Spool(SpoolSpace())
    draft = Draft(slow.copy(), body, 0, Transaction("1", "", ()), SpoolSpace())
    draft.apply(operations)
    for one in operations:
        match one:
            case AddHeader():
                slow.insert(0, HeaderField.of(one.name, one.value))
            case AppendHeader():
                slow.append(HeaderField.of(one.name, one.value))
            case InsertHeader():
                slow.insert(one.index, HeaderField.of(one.name, one.value))
            case ChangeHeader():
                slow.change(one.name, one.occurrence, HeaderField.of(one.name, one.value))
            case DeleteHeader():
                slow.delete(one.name, one.occurrence)
    assert draft.header.fields == slow.fields
    body.close()


class Counted(HeaderField):
    """A field whose name is counted each time that it is read."""

    reads = 0

    def __getattribute__(self, name: str) -> object:
        if name == "name":
            Counted.reads += 1
        return super().__getattribute__(name)


def test_many_changes_look_at_each_field_once() -> None:
    """Who sends thousands of fields and meets a filter that removes each holds nobody up."""
    fields = [Counted("A", b"A: 1") for _ in range(5000)]
    body = Spool(SpoolSpace())
    draft = Draft(Header(fields), body, 0, Transaction("1", "", ()), SpoolSpace())
    Counted.reads = 0
    draft.apply([DeleteHeader("A", 1)] * 5000)
    assert draft.header.fields == [] and 5000 <= Counted.reads <= 10_000
    body.close()


def test_too_many_changes(make: Make) -> None:
    draft = make()
    with pytest.raises(ValueError, match=str(MAX_OPERATIONS)):
        draft.apply([AddHeader("X", "1")] * (MAX_OPERATIONS + 1))
    draft.apply([AddHeader("X", "1")] * MAX_OPERATIONS)
    assert len(draft.header.fields) == MAX_OPERATIONS + 3


@pytest.mark.parametrize(
    ("content", "head"),
    [
        (b"", b"X: 1\r\n"),
        (b"\r\n", b"X: 1\r\n\r\n"),
        (b"A: 1\r\n", b"X: 1\r\nA: 1\r\n"),
        (b"A: 1\r\n\r\n", b"X: 1\r\nA: 1\r\n\r\n"),
        (b"no field\r\n", b"X: 1\r\n\r\n"),
        (b"A: 1\r\nno field\r\n", b"X: 1\r\nA: 1\r\n\r\n"),
    ],
)
def test_the_end_of_the_header(make: Make, content: bytes, head: bytes) -> None:
    """What was body is no field behind one that was added."""
    draft = make(content)
    draft.apply([AddHeader("X", "1")])
    assert draft.head(()) == head


def test_dots_of_the_head_are_stuffed(make: Make) -> None:
    draft = make()
    draft.apply([AddHeader(".B", "2"), AddHeader(".A", "1\r\n .x", leading_space=False)])
    assert draft.head(OWN).startswith(b"..A:1\r\n .x\r\n..B: 2\r\nReceived: own\r\nA: 1")


def test_unchanged(make: Make) -> None:
    """Changes that come to nothing are none."""
    draft = make()
    draft.apply([AddHeader("X", "1"), DeleteHeader("X"), ChangeSender("a@example.org"), RemoveRecipient("x@y")])
    assert not (draft.changed or draft.restart or draft.added)


def read(draft: Draft) -> bytes:
    """The body as it stands, in the form that DATA has."""
    reader, content = draft.body.reader(draft.offset), b""
    while block := reader.read_now():
        content += block
    reader.close()
    return content


def test_body(make: Make) -> None:
    """Octets or a body that was written; the last one counts, and those before it can be read on."""
    draft = make()
    before = draft.body
    draft.apply([ReplaceBody(b".one")])
    reader = draft.body.reader()
    written = SpooledBody(draft.space)
    for piece in (b"t", b"wo\r", b"\n", b".\n.x\ry"):
        written.write(piece)
    draft.apply([ReplaceBody(b"not this"), ReplaceBody(written)])
    assert read(draft) == b"two\r\n..\r\n..x y\r\n"
    assert reader.read_now() == b"..one\r\n"
    assert draft.changed and draft.body is not before
    reader.close()
    draft.apply([ReplaceBody(written)])
    assert read(draft) == b"two\r\n..\r\n..x y\r\n"
    draft.apply([ReplaceBody(b"")])
    assert read(draft) == b"" and draft.head(()).endswith(b"\r\n\r\n")


class Anything:
    """No body of ours."""

    def write(self, data: bytes) -> None:
        """Nowhere."""


IMPOSSIBLE: list[tuple[Operation, type[Exception]]] = [
    (AddRecipient("a\r\nDATA"), LocalError),
    (AddRecipient("\u00e9@example.net"), ValueError),
    (ChangeSender("\u00e9@example.net"), ValueError),
    (ChangeSender("<>"), LocalError),
    (ChangeSender("ok@example.org", (("X Y", None),)), LocalError),
    (ReplaceBody(Anything()), ValueError),
    (ReplaceBody(b"x" * 2000), OSError),
]


@pytest.mark.parametrize(("last", "error"), IMPOSSIBLE)
def test_all_or_nothing(make: Make, last: Operation, error: type[Exception]) -> None:
    """An operation that cannot be made takes those before it with it."""
    draft = make(HEAD + b"\r\nbody\r\n", "b@example.net", "c@example.net", space=SpoolSpace(memory=1000, total=1))
    before = draft.head(OWN)
    possible: list[Operation] = [
        AddHeader("X", "1"), DeleteHeader("A", 0), AddRecipient("n@example.net"), RemoveRecipient("b@example.net"),
        ReplaceBody(b"new"), ChangeSender("new@example.org"),
    ]  # fmt: skip
    with pytest.raises(error):
        draft.apply([*possible, last])
    assert not (draft.changed or draft.restart or draft.added or draft.replaced)
    assert (draft.head(OWN), read(draft), draft.sender) == (before, b"body\r\n", "a@example.org")
    assert [one.address for one in draft.recipients] == ["b@example.net", "c@example.net"]
    draft.apply(possible)
    assert draft.changed and draft.restart and draft.sender == "new@example.org"


PEOPLE: list[tuple[str, list[Operation], list[str], list[str], bool]] = [
    ("add", [AddRecipient("n@x")], ["b@x", "C@x", "n@x"], ["n@x"], False),
    ("add again", [AddRecipient("n@x"), AddRecipient("n@X")], ["b@x", "C@x", "n@x"], ["n@x"], False),
    ("add who is there", [AddRecipient("b@X")], ["b@x", "C@x"], [], False),
    ("local parts have case", [AddRecipient("B@x")], ["b@x", "C@x", "B@x"], ["B@x"], False),
    ("add and remove", [AddRecipient("n@x"), RemoveRecipient("n@X")], ["b@x", "C@x"], [], False),
    ("remove", [RemoveRecipient("b@X")], ["C@x"], [], True),
    ("remove nobody", [RemoveRecipient("c@x")], ["b@x", "C@x"], [], False),
    ("remove and add", [RemoveRecipient("b@x"), AddRecipient("b@x")], ["C@x", "b@x"], ["b@x"], True),
    ("remove all", [RemoveRecipient("b@x"), RemoveRecipient("C@x")], [], [], True),
    ("postmaster", [AddRecipient("postmaster"), AddRecipient("postmaster")], ["b@x", "C@x", "postmaster"], ["postmaster"], False),
]  # fmt: skip


@pytest.mark.parametrize(("operations", "recipients", "added", "restart"), [case[1:] for case in PEOPLE])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_recipients(
    make: Make, operations: list[Operation], recipients: list[str], added: list[str], restart: bool, one_by_one: bool
) -> None:
    draft = make(HEAD, "b@x", "C@x")
    for verdict in [[one] for one in operations] if one_by_one else [operations]:
        draft.apply(verdict)
    assert [one.address for one in draft.recipients] == recipients
    assert [one.address for one in draft.added] == added
    assert draft.restart == restart


def test_a_recipient_that_was_rewritten_is_removed_by_either_address(make: Make) -> None:
    for address in ("b@x", "new@x"):
        draft = make(HEAD, "b@x", "c@x")
        draft.recipients[0].rewrite("new@x", None)
        draft.apply([RemoveRecipient(address)])
        assert [one.address for one in draft.recipients] == ["c@x"]


def test_sender(make: Make) -> None:
    """Parameters stay unless others are given."""
    draft = make()
    draft.apply([ChangeSender("")])
    assert (draft.sender, draft.parameters, draft.restart) == ("", (("BODY", "8BITMIME"),), True)
    draft.apply([ChangeSender("x@y", ())])
    assert (draft.sender, draft.parameters) == ("x@y", ())
