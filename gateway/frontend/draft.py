"""What the stages made of a message so far: its header, its body, and whom it goes to.

The next stage sees a draft's header and body; the upstream gets it when the last stage that edits has answered.
Header fields of the gateway's own (`received`) stay hidden from stages, as Postfix hides its own from filters.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import assert_never

from gateway.frontend.header_changes import HeaderChanges
from gateway.protocol.content import DotStuffer
from gateway.protocol.headers import Header, HeaderField
from gateway.protocol.smtp import format_mail, format_rcpt
from gateway.relay.spool import Spool, SpoolFull, SpoolSpace
from gateway.session import Recipient, Transaction
from gateway.verdicts import (
    AddHeader,
    AddRecipient,
    AppendHeader,
    ChangeHeader,
    ChangeSender,
    DeleteHeader,
    InsertHeader,
    Operation,
    RemoveRecipient,
    ReplaceBody,
)

MAX_OPERATIONS = 10_000  # of one verdict: more would hold up other sessions


class SpooledBody:
    """A body that a stage writes: kept as the content of a message is, in the form that DATA has."""

    def __init__(self, space: SpoolSpace) -> None:
        self.spool = Spool(space)
        self._keep = self.spool.reader(waiting=True)
        self._stuffer = DotStuffer("normalize")

    def write(self, data: bytes) -> None:
        """See `gateway.NewBody`."""
        try:
            self.spool.write(self._stuffer.feed(data))
        except SpoolFull as error:
            raise OSError(errno.ENOSPC, f"no room for a new body: {error}") from error

    def finish(self) -> None:
        """Nothing more comes; the last line gets its end. Raises SpoolFull."""
        if not self.spool.ended:
            last = self._stuffer.finish()
            if last:
                self.spool.write(last)
            self.spool.end()


class Draft:
    """A message as it stands.

    `body` and `offset`: the spool that holds the body, in the form that DATA has, and where it begins there.
    `sender`, `parameters`, `recipients`: the envelope. `restart`: the upstream must hear the envelope anew;
    otherwise only those `added`. `replaced`: a stage wrote the body. `bodies`: all that stages wrote and that may be
    read until `close`, for somebody may still read one that was replaced.
    """

    __slots__ = (
        "_above", "added", "bodies", "body", "header", "offset", "parameters", "recipients", "replaced", "restart",
        "sender", "space",
    )  # fmt: skip

    def __init__(self, header: Header, body: Spool, offset: int, transaction: Transaction, space: SpoolSpace) -> None:
        self.header = header
        self.body = body
        self.offset = offset
        self.space = space
        self.sender = transaction.sender
        self.parameters = transaction.parameters
        self.recipients = list(transaction.recipients)
        self.added: list[Recipient] = []
        self.restart = False
        self.replaced = False
        self.bodies: list[SpooledBody] = []
        self._above = 0  # fields that stages put above those of the gateway's own

    @property
    def changed(self) -> bool:
        """Whether the content is another than the client's; so is one whose header no empty line ended."""
        return self.header.changed or self.replaced or (self.body_follows and not self.header.end)

    def apply(self, operations: Sequence[Operation]) -> None:
        """Make the changes, all of them or, if one cannot be made, none.

        Raises ValueError or LocalError for what has no form in a message or in SMTP, ValueError for more than
        MAX_OPERATIONS, SpoolFull or OSError where there is no room for a body.
        """
        if len(operations) > MAX_OPERATIONS:
            raise ValueError(f"{len(operations)} changes to one message; {MAX_OPERATIONS} are possible")
        changes = _Changes(self)
        for operation in operations:
            changes.make(operation)
        changes.commit()

    def head(self, own: Sequence[AddHeader]) -> bytes:
        """The header section in the form that DATA has, `own` fields at their place."""
        header = self.header.copy()
        header.fields[self._above : self._above] = [_field(one) for one in own]
        text = header.encode(body_follows=self.body_follows)
        if text[:1] == b".":
            text = b"." + text
        return text.replace(b"\r\n.", b"\r\n..")

    @property
    def body_follows(self) -> bool:
        """Whether there is a body."""
        return self.body.size > self.offset

    def close(self) -> None:
        """Give back the room of the bodies that stages wrote."""
        for body in self.bodies:
            body.spool.close()

    def take_body(self, body: SpooledBody) -> None:
        """From now on this is the body."""
        if body not in self.bodies:
            self.bodies.append(body)
        self.replaced = True
        self.body, self.offset = body.spool, 0
        self.header.end = b"\r\n"


class _Changes:
    """The operations of one verdict, kept beside the draft until the last of them is known to be possible."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._header: HeaderChanges | None = None
        self._people: _People | None = None
        self._body: SpooledBody | None = None
        self._sender = draft.sender
        self._parameters = draft.parameters

    def make(self, operation: Operation) -> None:
        """One of them. Raises what `Draft.apply` does."""
        match operation:
            case AddHeader():
                self._fields().insert(0, _field(operation), above=True)
            case InsertHeader():
                self._insert(operation)
            case AppendHeader():
                self._fields().append(_field(operation))
            case ChangeHeader():
                self._fields().change(operation.name, operation.occurrence, _field(operation))
            case DeleteHeader():
                self._fields().delete(operation.name, operation.occurrence)
            case ReplaceBody():
                self._replace(operation)
            case AddRecipient():
                format_rcpt(operation.address, operation.parameters)
                self._can_be_said(operation.address)
                self._recipients().add(operation)
            case RemoveRecipient():
                self._recipients().remove(operation.address)
            case ChangeSender():
                self._sender = operation.address
                self._parameters = self._parameters if operation.parameters is None else operation.parameters
                format_mail(self._sender, self._parameters)
                self._can_be_said(self._sender)
            case _:
                assert_never(operation)

    def commit(self) -> None:
        """Make them the draft's; nothing can fail any more."""
        draft = self._draft
        if self._header is not None:
            draft.header.fields, draft._above = self._header.fields(), self._header.above
        if self._body is not None:
            draft.take_body(self._body)
        if self._people is not None:
            people = self._people
            draft.recipients = list(people.kept)
            draft.added = [one for one in people.kept if one in people.added]
            draft.restart = draft.restart or people.restart
        if (self._sender, self._parameters) != (draft.sender, draft.parameters):
            draft.sender, draft.parameters = self._sender, self._parameters
            draft.restart = True

    def _can_be_said(self, address: str) -> None:
        """Raises ValueError for an address that MAIL had to announce (RFC 6531 3.4)."""
        if not address.isascii() and ("SMTPUTF8", None) not in self._parameters:
            raise ValueError(f"{address!r} in a message without SMTPUTF8")

    def _fields(self) -> HeaderChanges:
        if self._header is None:
            self._header = HeaderChanges(self._draft.header.fields, self._draft._above)
        return self._header

    def _recipients(self) -> _People:
        if self._people is None:
            self._people = _People(self._draft.recipients, self._draft.added)
        return self._people

    def _insert(self, operation: InsertHeader) -> None:
        fields, index = self._fields(), max(operation.index, 0)
        if operation.below_trace:
            above = index <= fields.above
            fields.insert(index if above else index - 1, _field(operation), above=above)
        else:
            fields.insert(index, _field(operation), above=index < fields.above)

    def _replace(self, operation: ReplaceBody) -> None:
        body = operation.body
        if isinstance(body, bytes):
            written = SpooledBody(self._draft.space)
            self._draft.bodies.append(written)
            written.write(body)
            body = written
        if not isinstance(body, SpooledBody):
            raise ValueError("the body of ReplaceBody is neither bytes nor made by Message.new_body()")
        body.finish()
        self._body = body


class _People:
    """The recipients while they change: `kept` in their order, which of them were `added`, by mailbox."""

    def __init__(self, recipients: Sequence[Recipient], added: Sequence[Recipient]) -> None:
        self.kept = dict.fromkeys(recipients)
        self.added = set(added)
        self.restart = False
        self._at: dict[str, list[Recipient]] = {}
        for one in recipients:
            for mailbox in {_mailbox(one.address), _mailbox(one.original)}:
                self._at.setdefault(mailbox, []).append(one)

    def add(self, operation: AddRecipient) -> None:
        """One more, unless the message goes there already."""
        mailbox = _mailbox(operation.address)
        there = self._at.setdefault(mailbox, [])
        if any(one in self.kept and _mailbox(one.address) == mailbox for one in there):
            return
        recipient = Recipient(operation.address, operation.parameters, -1)
        there.append(recipient)
        self.kept[recipient] = None
        self.added.add(recipient)

    def remove(self, address: str) -> None:
        """Nobody of this address gets it; one that the upstream knows already makes it hear the envelope anew."""
        for one in self._at.pop(_mailbox(address), ()):
            if one in self.kept:
                del self.kept[one]
                self.restart = self.restart or one.index >= 0


def _field(operation: AddHeader | InsertHeader | AppendHeader | ChangeHeader) -> HeaderField:
    return HeaderField.of(operation.name, operation.value, leading_space=operation.leading_space)


def _mailbox(address: str) -> str:
    """What two spellings of one mailbox have in common: domains are without case (RFC 5321 2.4)."""
    local, _, domain = address.rpartition("@")
    return f"{local}@{domain.lower()}"
