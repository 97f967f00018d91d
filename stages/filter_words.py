"""What a filter's words mean here, whether it is asked over a socket (`milter`) or runs inside (`pymilter`).

Its changes become operations on the message, as Postfix makes them: a field with no value but blanks is deleted, an
inserted one is counted as if the server's own Received stood on top, and of the ESMTP parameters that it sets those
of DSN count and no others (RFC 3461; milter(8) of Postfix). A message that it wants held is what Postfix puts into its
hold queue; the gateway has none, so the setting `quarantine` says what becomes of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Final

from pydantic import PlainValidator, TypeAdapter, WithJsonSchema

from gateway import AddHeader as PutInFront
from gateway import (
    AddRecipient,
    AppendHeader,
    Cause,
    ChangeHeader,
    ChangeSender,
    DeleteHeader,
    Edit,
    Edits,
    InsertHeader,
    Operation,
    PoolReference,
    Refuse,
    RemoveRecipient,
    Transaction,
    Upstream,
)
from gateway.protocol import milter
from gateway.protocol.milter import Action

Parameters = tuple[tuple[str, str | None], ...]

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_REASON: Final = 400  # characters of a reason that are shown
_POOL: Final[TypeAdapter[str]] = TypeAdapter(PoolReference)


# A message that it wants held


class Held(StrEnum):
    """What becomes of such a message if it is not sent to another pool."""

    REFUSE = "refuse"
    HEADER = "header"


def _quarantine(value: object) -> Held | str:
    """`refuse`, `header` or `route:pool`; of the last the name of the pool."""
    if isinstance(value, str):
        if value in ("refuse", "header"):
            return Held(value)
        way, _, pool = value.partition(":")
        if way == "route" and pool.strip():
            return _POOL.validate_python(pool.strip())
    raise ValueError(f"{str(value)[:60]!r} is not what can become of a message; write refuse, header or route:<pool>")


Quarantine = Annotated[
    Held | str,
    PlainValidator(_quarantine),
    WithJsonSchema(
        {"type": "string", "pattern": r"^(?:refuse|header|route:.+)$|\$\{", "x-kind": "refuse, header or route:pool"}
    ),
]
"""The setting: one of `Held`, or the name of the pool that takes the message."""


def quarantined(operations: Sequence[Operation], setting: Held | str, reason: str) -> Refuse | Edit:
    """What becomes of a message that the filter changes so and wants held for this reason."""
    shown = _CONTROL.sub("?", reason)[:_REASON].strip()
    if setting is Held.REFUSE:
        return Refuse(Cause.CONTENT, log=f"quarantine: {shown}")
    if setting is Held.HEADER:
        text = shown.encode("ascii", "replace").decode() or "yes"
        return Edit([*operations, PutInFront("X-Quarantine", text)])
    return Edit(list(operations), Upstream(pool=str(setting)))


# What it changes. A value may bring its own blank from behind the colon, then there is no other leading space.


def insert_field(index: int, name: str, value: str, *, leading_space: bool) -> Operation:
    """A field at a place: 0 above the server's own Received, 1 below it. Raises ValueError for what is no field."""
    return InsertHeader(index, name, value, leading_space, below_trace=True)


def change_field(index: int, name: str, value: str, *, leading_space: bool) -> Operation:
    """Another value for the `index`th field of that name, 0 read as 1. Raises ValueError for what is no field."""
    if not value.strip():
        return DeleteHeader(name, max(index, 1))
    return ChangeHeader(name, value, max(index, 1), leading_space)


def add_recipient(address: str, parameters: Parameters) -> Operation:
    """One more recipient, with the filter's NOTIFY and ORCPT."""
    return AddRecipient(address, _of_dsn(parameters, "NOTIFY", "ORCPT"))


def change_sender(address: str, parameters: Parameters, transaction: Transaction) -> Operation:
    """Another sender; the filter's RET and ENVID take the place of the client's."""
    said = _of_dsn(parameters, "RET", "ENVID")
    return ChangeSender(address, tuple({**dict(transaction.parameters), **dict(said)}.items()) if said else None)


def _of_dsn(parameters: Parameters, *names: str) -> Parameters:
    """Those of the parameters that have one of the names, the last of each."""
    return tuple({name.upper(): value for name, value in parameters if name.upper() in names}.items())


# The same as packets of the protocol


def operation(said: milter.Modification, transaction: Transaction) -> Operation:
    """A change of what is no body. Values come with the blank behind the colon. Raises ValueError for no field."""
    match said:
        case milter.AddHeader():
            return AppendHeader(_text(said.name), _text(said.value), leading_space=False)
        case milter.InsertHeader():
            return insert_field(said.index, _text(said.name), _text(said.value), leading_space=False)
        case milter.ChangeHeader():
            return change_field(said.index, _text(said.name), _text(said.value), leading_space=False)
        case milter.AddRecipient():
            return add_recipient(said.address, said.parameters)
        case milter.DeleteRecipient():
            return RemoveRecipient(said.address)
        case milter.ChangeSender():
            return change_sender(said.address, said.parameters, transaction)
    raise TypeError(f"no change of a message: {type(said).__name__}")


def _text(octets: bytes) -> str:
    return octets.decode("utf-8", "surrogateescape")


def edits_of(actions: Action) -> Edits:
    """What the actions that a filter agreed on can do to a message."""
    changes = actions & ~Action.SETSYMLIST
    if not changes:
        return "none"
    return "any" if changes & ~(Action.ADDHDRS | Action.CHGHDRS) else "head"


def refusal(verdict: milter.Verdict) -> Refuse | None:
    """A refusal in the gateway's words, or in the filter's own; None for a verdict that is none."""
    match verdict:
        case milter.Reject():
            return Refuse(Cause.POLICY, text="refused by a filter", temporary=False)
        case milter.Tempfail():
            return Refuse(Cause.CONTENT, text="try again later", temporary=True)
        case milter.ReplyCode():
            return Refuse(Cause.CONTENT, reply=verdict.reply)
        case milter.Shutdown():
            return Refuse(Cause.SHUTDOWN, disconnect=True, log="filter says shutdown")
    return None
