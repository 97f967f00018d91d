"""Refuse messages that go in a circle, by their Received fields.

Each server that a message passes adds a Received field. One that has `max` of them is refused with 554 5.4.6 as soon
as its header is read (RFC 5321 6.3; Postfix's hopcount_limit). Unlike `received`, which counts in passing, this stage
adds no field of its own; where both stand in a chain, the smaller number decides.

`delivered_to: true` also finds a circle that runs over a mailbox, long before the number is reached: Postfix's
local(8) and others put `Delivered-To: <recipient>` in front of what they forward, and a message that comes to a
recipient whom such a field names was there already. An LMTP client is told for each recipient alone. An SMTP client can
be told one thing only, which is the same 554 5.4.6 for all: what loops is not wanted another time.

A guard: an earlier Allow does not skip it. Reads the header alone, edits nothing, and has no helper that could be down.

    stages:
      - hop_limit
      - hop_limit: {max: 30, delivered_to: true}
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from gateway import Cause, Kind, Message, Recipient, Refuse, Reply, Session, Settings, Stage
from gateway.protocol.headers import Header

_LOOP = Reply.of("554 5.4.6 mail loop: already delivered to this recipient")


class HopLimitSettings(Settings):
    """What counts as a circle."""

    short_form: ClassVar[str | None] = "max"

    max: Annotated[int, Field(ge=1, le=1000)] = Field(
        50, description="Received fields with which a message counts as looping."
    )
    delivered_to: bool = Field(
        False, description="Refuse recipients whom a Delivered-To field of the message names already."
    )


class HopLimit(Stage):
    """Refuse messages that go in a circle."""

    Settings = HopLimitSettings
    kind = Kind.GUARD
    settings: HopLimitSettings

    async def message(self, session: Session, message: Message) -> Refuse | None:
        """Count what servers wrote into the header."""
        header = await message.headers()
        hops = header.count("Received")
        if hops >= self.settings.max:
            return Refuse(Cause.LOOP, log=f"{hops} Received fields")
        if not self.settings.delivered_to:
            return None
        return _refuse_known(session, message.transaction.recipients, _delivered_to(header))


def _delivered_to(header: Header) -> set[str]:
    return {field.text.strip("<>").lower() for field in header.all("Delivered-To")}


def _refuse_known(session: Session, recipients: list[Recipient], known: set[str]) -> Refuse | None:
    """Refuse the recipients that are known already: each alone where the protocol can say so."""
    again = [recipient for recipient in recipients if recipient.address.lower() in known]
    if not again:
        return None
    log = f"already delivered to {', '.join(recipient.address for recipient in again[:5])}"
    if session.protocol == "lmtp" and len(again) < len(recipients) and all(one.index >= 0 for one in again):
        return Refuse(Cause.LOOP, recipients={recipient.index: _LOOP for recipient in again}, log=log)
    return Refuse(Cause.LOOP, log=log)
