"""Limit the size of messages: for all, or by user, recipient, client, or whatever else is known.

The first of the `rules` that holds decides, `max` is for the rest. A rule over `rcpt` facts holds for single
recipients, and a message may be as large as the strictest of its recipients takes.

| asked in | what happens |
|---|---|
| EHLO | the announced SIZE is narrowed to the largest limit that is still possible |
| MAIL | SIZE= above every limit that is still possible is refused with 552 5.3.4 (RFC 1870 6.1) |
| RCPT | SIZE= above the limit of this recipient refuses the recipient |
| content | the octets are counted, and what grows above the limit is refused, whatever SIZE= said |

What is too large at the end for some recipients only is told to an LMTP client for each of them, and refused as a whole
to an SMTP client. Rules over `auth` facts count as possible until the client has logged in. `max` cannot be more than
the pipeline's `limits.message_size` and the upstream's own SIZE, which hold in any case.

A guard: an earlier Allow does not skip it. Reads the content while it passes, keeps nothing of it, has no helper.

    stages:
      - size_limit: 25MiB
      - size_limit:
          max: 10MiB
          rules:
            - {when: 'auth.domain == "studio.example"', max: 100MiB}
            - {when: 'rcpt.domain == "lists.example.org"', max: 512k}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from gateway import (
    Cause,
    Condition,
    Kind,
    Message,
    Phase,
    Recipient,
    Refuse,
    Reply,
    Session,
    Settings,
    Size,
    Stage,
    Transaction,
)

_TOO_BIG = Reply.of("552 5.3.4 message size exceeds limit")


class SizeRule(BaseModel):
    """One rule: a condition and the limit for what it fits."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    when: Condition = Field(description="What the rule fits.")
    max: Size = Field(gt=0, description="Octets that a message may have.")


class SizeLimitSettings(Settings):
    """The limits."""

    short_form: ClassVar[str | None] = "max"

    max: Size = Field(gt=0, description="Octets that a message may have where no rule holds.")
    rules: tuple[SizeRule, ...] = Field((), description="Conditions and their limits; the first that holds decides.")


class SizeLimit(Stage):
    """Limit the size of messages, by rules."""

    Settings = SizeLimitSettings
    kind = Kind.GUARD
    settings: SizeLimitSettings

    def capabilities(self, session: Session, offer: dict[str, str]) -> None:
        """Announce no more than some message may have (RFC 1870 4; 0 or nothing is: no limit)."""
        if "SIZE" not in offer:
            return
        known = Phase.AUTH if session.user else Phase.HELO
        largest = max(self._possible(session, None, known))
        announced = int(offer["SIZE"]) if offer["SIZE"].isdigit() else 0
        offer["SIZE"] = str(min(announced, largest) if announced else largest)

    def mail(self, session: Session, transaction: Transaction) -> Refuse | None:
        """Refuse what is too large for anybody."""
        return _checked(transaction.declared_size, max(self._possible(session, transaction, Phase.MAIL)))

    def rcpt(self, session: Session, recipient: Recipient) -> Refuse | None:
        """Refuse what is too large for this recipient."""
        transaction = session.transaction
        if transaction is None:
            return None
        return _checked(transaction.declared_size, max(self._possible(session, transaction, Phase.RCPT, recipient)))

    async def message(self, session: Session, message: Message) -> Refuse | None:
        """Count what is really sent; stop reading when nobody may have it."""
        transaction = message.transaction
        limits = {one: self._limit(session, transaction, one) for one in transaction.recipients}
        smallest = min(limits.values(), default=self.settings.max)
        # Only LMTP can answer each recipient, and only those whom the client named.
        each = session.protocol == "lmtp" and all(one.index >= 0 for one in limits)
        largest = max(limits.values(), default=self.settings.max) if each else smallest
        async for _ in message.blocks():
            if message.size > largest:
                break
        if not each or message.size > largest:
            return _checked(message.size, largest)
        over = {one.index: _TOO_BIG for one, limit in limits.items() if message.size > limit}
        return Refuse(Cause.MESSAGE_TOO_BIG, recipients=over, log=f"{message.size} octets") if over else None

    def _limit(self, session: Session, transaction: Transaction, recipient: Recipient) -> int:
        """The limit of a recipient, when all is known."""
        for rule in self.settings.rules:
            if rule.when.evaluate(session, transaction, recipient):
                return rule.max
        return self.settings.max

    def _possible(
        self, session: Session, transaction: Transaction | None, known: Phase, recipient: Recipient | None = None
    ) -> Iterator[int]:
        """The limits that may hold once everything is known: facts up to the phase `known` are."""
        for rule in self.settings.rules:
            if rule.when.phase > known:
                yield rule.max
            elif rule.when.evaluate(session, transaction, recipient):
                yield rule.max
                return
        yield self.settings.max


def _checked(size: int, limit: int) -> Refuse | None:
    return Refuse(Cause.MESSAGE_TOO_BIG, log=f"{size} octets, limit {limit}") if size > limit else None
