"""Let clients wait for the greeting, and refuse those that do not.

Mail programs wait for the server's 220 (RFC 5321 4.3.1); many spam programs send at once. The clock starts in
`connect` and the stages behind this one run meanwhile, so that a delay of a second hides a reverse DNS look-up of
as long. With implicit TLS the wait is in `greeting`, because before the handshake there are no SMTP bytes to see.

A client that talks early is refused with 554 5.5.0 and closed, or with `early: observe` only noted in the fact
`client.early`. An `Allow` of an earlier stage (an access list, say) skips the delay. Costs nothing but time; there is
no helper that could be down. A client that is closed here has cost no upstream connection.

    stages:
      - greeting_delay: 1s
      - greeting_delay: {seconds: 5s, early: observe, exempt: [10.0.0.0/8]}
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from gateway import Cause, CidrList, Duration, Hold, Kind, NetworkTable, Refuse, Session, Settings, Stage


class GreetingDelaySettings(Settings):
    """How long, for whom, and what an early talker gets."""

    short_form: ClassVar[str | None] = "seconds"

    seconds: Duration = Field(description="Wait before the greeting.")
    early: Literal["refuse", "observe"] = Field(
        "refuse", description="A client that talks before the greeting is refused and closed, or only noted."
    )
    exempt: CidrList = Field((), description="Clients that are greeted at once.")


class GreetingDelay(Stage):
    """Let clients wait for the greeting, and refuse those that do not."""

    Settings = GreetingDelaySettings
    kind = Kind.CHECK
    refuse_now = True
    settings: GreetingDelaySettings

    def __init__(self, settings: GreetingDelaySettings) -> None:
        super().__init__(settings)
        early = Refuse(Cause.EARLY_TALKER, disconnect=True) if settings.early == "refuse" else None
        self._hold = Hold(settings.seconds, early)
        self._exempt = NetworkTable.of(settings.exempt)

    def connect(self, session: Session) -> Hold | None:
        """Start the clock at once, so that it runs beside slower stages."""
        return None if session.listener.implicit_tls else self._wait(session)

    def greeting(self, session: Session) -> Hold | None:
        """Start the clock after the handshake of implicit TLS."""
        return self._wait(session) if session.listener.implicit_tls else None

    def _wait(self, session: Session) -> Hold | None:
        return None if session.client.address in self._exempt else self._hold
