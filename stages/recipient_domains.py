"""Take mail only for the domains this gateway is there for; a logged-in client may write to anybody.

Asked at RCPT. A recipient of another domain is 550 5.7.1, and so is one whose local part names a further host
(`user%other.example@ours`, `other.example!user@ours`), which an upstream that trusts the gateway might send on.
`.example.org` stands for all domains below example.org. `postmaster` without a domain is taken (RFC 5321 4.5.1).

This is what keeps a gateway without login from being an open relay, so it is a guard: no allow list skips it and it
cannot be told to fail open. A file has one domain a line and is re-read within a second after it changed; one that
becomes unreadable keeps its old content, with a warning. Costs a look-up or two.

    stages:
      - recipient_domains: [example.org, .example.org]
      - recipient_domains: {file: lists/domains}
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from gateway import (
    Cause,
    ExistingFile,
    Kind,
    ListFile,
    NameTable,
    Recipient,
    Refuse,
    Session,
    Settings,
    Stage,
)

_ROUTING = frozenset("%!@")  # sender-specified routing in a local part, as Postfix calls it


def _table(domains: Iterable[str]) -> NameTable[bool]:
    """Raises ValueError for what is no domain."""
    table: NameTable[bool] = NameTable()
    for domain in domains:
        if "@" in domain or "." not in domain.strip("."):
            raise ValueError(f"{domain[:60]!r} is not a domain; write example.org, or .example.org for all below it")
        table.add(domain, True)
    return table


def _checked(domains: tuple[str, ...]) -> tuple[str, ...]:
    _table(domains)
    return domains


class RecipientDomainsSettings(Settings):
    """The domains, inline and in a file."""

    short_form: ClassVar[str | None] = "domains"

    domains: Annotated[tuple[str, ...], AfterValidator(_checked)] = Field(
        (), description="Domains that mail is taken for; .example.org is all below example.org."
    )
    file: ExistingFile | None = Field(None, description="A file of such domains, one a line.")

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not self.domains and self.file is None:
            raise ValueError("takes mail for nobody; write domains or file")
        if self.file is not None:
            ListFile(self.file, _table)
        return self


class RecipientDomains(Stage):
    """Take mail only for the domains this gateway is there for."""

    Settings = RecipientDomainsSettings
    kind = Kind.GUARD
    limits_recipients = True
    never_pass = True
    settings: RecipientDomainsSettings

    def __init__(self, settings: RecipientDomainsSettings) -> None:
        super().__init__(settings)
        self._domains = _table(settings.domains)
        self._file = ListFile(settings.file, _table) if settings.file is not None else None

    def rcpt(self, session: Session, recipient: Recipient) -> Refuse | None:
        """Refuse recipients elsewhere, unless the client logged in."""
        if session.user:
            return None
        domain, address = recipient.domain, recipient.address
        if not domain:
            return None if address.lower() == "postmaster" else Refuse(Cause.RELAY_DENIED)
        if domain not in self._domains and (self._file is None or domain not in self._file.current()):
            return Refuse(Cause.RELAY_DENIED)
        if not _ROUTING.isdisjoint(address.rpartition("@")[0]):
            return Refuse(Cause.RELAY_DENIED, log="the local part names a further host")
        return None
