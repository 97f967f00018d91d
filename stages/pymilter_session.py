"""What is known of a session and of a message with a filter inside: what it was told and what it said so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway import Cause, Refuse
from gateway.protocol.milter import Stage, Step
from stages.pymilter_context import Code
from stages.pymilter_filter import MilterFilter


@dataclass(frozen=True)
class Question:
    """What the filter is asked, the step that says it does not want it, its macros, and the cause of a refusal.

    `ends`: a refusal is for the whole message.
    """

    name: str
    unwanted: Step
    at: Stage
    macros: Mapping[str, str]
    cause: Cause
    ends: bool = True


@dataclass
class Mail:
    """A message as the filter knows it: `open` until its verdict, without which it ends with `abort`.

    `discarded` says where the filter said DISCARD. In `envrcpt` that is no verdict for libmilter, but no more follows.
    `skipped`: it wants no more of the body. `failed`: it was lost, or failed where that concerns the whole message.
    """

    filter: MilterFilter
    failed: bool = False
    open: bool = True
    discarded: str = ""
    skipped: bool = False

    @property
    def listens(self) -> bool:
        """Whether the filter wants to hear more of it."""
        return self.open and not self.discarded and not self.filter.lost

    def answer(self, asked: Question, code: Code) -> Refuse | None:
        """Take in what the filter said."""
        refused = code in (Code.REJECT, Code.TEMPFAIL)
        if code is Code.ACCEPT or (asked.ends and (refused or code is Code.DISCARD)):
            self.open = False
        self.skipped = code is Code.SKIP
        if code is Code.DISCARD:
            self.discarded = f"DISCARD in {asked.name}"
        return refusal(self.filter, code, asked.cause, asked.name) if refused else None

    def fail(self, asked: Question) -> None:
        """It gave no answer: what it knows of this message is no more to be relied on."""
        self.failed = asked.ends or self.filter.lost
        self.open = self.open and not asked.ends


@dataclass
class Seat:
    """The filter of a session, another one after it was lost, and the last message that it was told of.

    `refusal`: it refused in connect or hello. `done`: it accepted there, or wanted to hear of nothing.
    """

    filter: MilterFilter
    mail: Mail | None = None
    refusal: Refuse | None = None
    done: bool = False

    @property
    def listens(self) -> bool:
        """Whether there is a filter that was told of the client and wants to hear more."""
        return self.filter.introduced and not (self.filter.lost or self.done or self.refusal)


def refusal(filter: MilterFilter, code: Code, cause: Cause, name: str) -> Refuse:
    """A REJECT or TEMPFAIL; the filter's reply counts if it is of the same class, and 421 closes (libmilter)."""
    temporary, reply = code is Code.TEMPFAIL, filter.context.reply
    if reply is not None and reply.reply_class != (4 if temporary else 5):
        reply = None
    disconnect = reply is not None and reply.code == 421
    return Refuse(cause, temporary=temporary, reply=reply, disconnect=disconnect, log=f"{code.name} in {name}")
