"""Put a Received field in front of each message, for upstreams that do not learn of the client otherwise.

Asked at DATA. The field (RFC 5321 4.4) says who the client called itself, its address and verified name, by which
protocol it came (RFC 3848, RFC 6531 4.3), the transaction's id and the time; the recipient only where there is just
one, so that blind copies stay blind. With XCLIENT the upstream writes such a field itself and this stage is not needed.

While a message passes, its Received fields are counted; one with `max_hops` of them goes in a circle and is refused
with 554 5.4.6. Costs nothing to speak of, but each message is then read to its end (grade envelope).

    stages:
      - received
      - received: 30       # max_hops
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from email.utils import formatdate
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gateway import AddHeader, Edit, Kind, Session, Settings, Stage, Transaction, Worker

# What may stand as a name in the field without quoting: a domain, or an address in brackets.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}|\[[A-Za-z0-9:.]{1,64}\]")


class ReceivedSettings(Settings):
    """How many fields are too many."""

    short_form: ClassVar[str | None] = "max_hops"

    max_hops: Annotated[int, Field(ge=1, le=1000)] = Field(
        50, description="Received fields with which a message counts as looping."
    )


class Received(Stage):
    """Put a Received field in front of each message and refuse messages that go in a circle."""

    Settings = ReceivedSettings
    kind = Kind.PLUMBING
    counts_received: ClassVar[bool] = True  # the relay counts them in passing, up to settings.max_hops
    settings: ReceivedSettings
    _hostname: str

    async def start(self, worker: Worker) -> None:
        """Keep the name of this gateway."""
        self._hostname = worker.hostname

    def phases(self) -> Sequence[str]:
        """The recipients must be known."""
        return ["data"]

    def edits(self, transaction: Transaction) -> Literal["head"]:
        """A field in front, nothing else."""
        return "head"

    def data(self, session: Session, transaction: Transaction) -> Edit:
        """The field of this message."""
        return Edit([AddHeader("Received", self._field(session, transaction))])

    def _field(self, session: Session, transaction: Transaction) -> str:
        helo = session.helo if _NAME.fullmatch(session.helo) else "unknown"
        lines = [f"from {helo} ({_tcp_info(session)})"]
        if session.tls is not None:
            lines.append(f"(using {session.tls.version} with cipher {session.tls.cipher})")
        lines.append(f"by {self._hostname} with {_protocol(session, transaction)}")
        lines.append(f"id {transaction.id}")
        if len(transaction.recipients) == 1:
            address = transaction.recipients[0].original
            if address.isascii() or transaction.smtputf8:
                lines.append(f"for <{address}>")
        return "\r\n\t".join(lines) + f";\r\n\t{formatdate(localtime=True)}"


def _tcp_info(session: Session) -> str:
    """The verified name, if there is one, and the address (RFC 5321 4.4, TCP-info)."""
    client = session.client
    address = f"IPv6:{client.address}" if ":" in client.address else client.address
    literal = f"[{address or 'local'}]"
    return f"{client.name if client.name_status == 'ok' else 'unknown'} {literal}"


def _protocol(session: Session, transaction: Transaction) -> str:
    if not session.esmtp:
        return "SMTP"
    if session.protocol == "lmtp":
        base = "UTF8LMTP" if transaction.smtputf8 else "LMTP"
    else:
        base = "UTF8SMTP" if transaction.smtputf8 else "ESMTP"
    return base + ("S" if session.tls is not None else "") + ("A" if session.user else "")
