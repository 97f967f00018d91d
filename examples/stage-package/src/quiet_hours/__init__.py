"""Refuse mail from given networks during given hours.

Asked at MAIL, so that a session that began before the hours is held to them too. By default the sender is told to come
back (450 4.7.1) and its own queue keeps the mail until the morning; `answer: reject` sends it back (550 5.7.1);
`answer: none` refuses nothing and only sets the fact `<id>.active` for the stages behind it. Hours are those of the
machine's time zone; `from` later than `to` goes over midnight, and from `to` on mail is taken again.

Costs a look at the clock; has no helper that could be down.

    stages:
      - quiet_hours: {from: "22:00", to: "06:00", networks: [10.20.0.0/16]}
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, time
from typing import Literal, Self

from pydantic import Field, model_validator

from gateway import (
    Cause,
    CidrList,
    Fact,
    Kind,
    NetworkTable,
    Phase,
    Refuse,
    Scope,
    Session,
    Settings,
    Stage,
    Transaction,
)


class QuietHoursSettings(Settings):
    """When, for whom, and how firmly."""

    from_: time = Field(alias="from", description="Begin, such as 22:00.")
    to: time = Field(description="End; before `from` it is on the next day.")
    networks: CidrList = Field((), description="Clients that are refused; all of them by default.")
    answer: Literal["tempfail", "reject", "none"] = Field(
        "tempfail", description="Ask for another try, send the mail back, or only set the fact."
    )

    @model_validator(mode="after")
    def _some_time(self) -> Self:
        if self.from_ == self.to:
            raise ValueError("from and to are the same; write two times")
        return self


class QuietHours(Stage):
    """Refuse mail from given networks during given hours."""

    Settings = QuietHoursSettings
    kind = Kind.CHECK
    facts = (Fact("active", "bool", False, Phase.MAIL, Scope.TRANSACTION, "The hours are quiet for this client."),)
    settings: QuietHoursSettings

    def __init__(self, settings: QuietHoursSettings, now: Callable[[], datetime] = datetime.now) -> None:
        super().__init__(settings)
        self._now = now
        self._networks = NetworkTable.of(settings.networks)

    def mail(self, session: Session, transaction: Transaction) -> Refuse | None:
        """Refuse a client that is to be quiet now."""
        if self.settings.networks and session.client.address not in self._networks:
            return None
        if not self._quiet(self._now().time()):
            return None
        session.set_transaction_fact(self, "active", True)
        if self.settings.answer == "none":
            return None
        temporary = self.settings.answer == "tempfail"
        return Refuse(Cause.POLICY, f"no mail before {self.settings.to:%H:%M}", temporary=temporary)

    def _quiet(self, now: time) -> bool:
        begin, end = self.settings.from_, self.settings.to
        return begin <= now < end if begin < end else now >= begin or now < end
