"""Let a logged-in user send with their own addresses only.

Asked at MAIL. An address is a user's own if it is the login itself (`same_address`), or if `map` or `file` gives it to
the user: whole addresses, or `@example.org` for all of a domain. Others are 553 5.7.1. Case does not matter. The empty
sender of bounces and out-of-office notes is everybody's unless `null_sender: false` says otherwise.

Clients that did not log in are not judged here, unless `required: true` makes that 530. The header From: is not
looked at. A file has one user a line, then their addresses with blanks between; it is re-read within a second after it
changed, and one that becomes unreadable keeps its old content, with a warning. Costs a look-up or two.

    stages:
      - auth_file: users
      - sender_login: {map: {alice@example.org: [sales@example.org, "@news.example.org"]}}
      - sender_login: {file: senders, same_address: false, required: true}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from gateway import Cause, ExistingFile, Kind, ListFile, Refuse, Session, Settings, Stage, Transaction

_Owned = dict[str, set[str]]


def _add(owned: _Owned, user: str, addresses: Iterable[str]) -> None:
    """Raises ValueError for what is neither an address nor a domain."""
    own = owned.setdefault(user.lower(), set())
    for address in addresses:
        if "@" not in address or address.endswith("@") or any(c.isspace() for c in address):
            raise ValueError(f"{address[:60]!r} is not an address; write user@example.org or @example.org")
        own.add(address.lower())


def _table(lines: Iterable[str]) -> _Owned:
    owned: _Owned = {}
    for line in lines:
        user, *addresses = line.replace(",", " ").split()
        if not addresses:
            raise ValueError(f"no address behind the user {user[:60]!r}")
        _add(owned, user, addresses)
    return owned


def _from_map(given: Mapping[str, tuple[str, ...]]) -> _Owned:
    owned: _Owned = {}
    for user, addresses in given.items():
        _add(owned, user, addresses)
    return owned


def _checked(given: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    _from_map(given)
    return given


class SenderLoginSettings(Settings):
    """Whose addresses are whose."""

    short_form: ClassVar[str | None] = "file"

    map: Annotated[dict[str, tuple[str, ...]], AfterValidator(_checked)] = Field(
        default_factory=dict, description="Addresses of each user: user@example.org, or @example.org for all of it."
    )
    file: ExistingFile | None = Field(None, description="A file of the same: one user a line, then the addresses.")
    same_address: bool = Field(True, description="The login is one of the user's own addresses.")
    required: bool = Field(False, description="Refuse MAIL of clients that did not log in (530).")
    null_sender: bool = Field(True, description="Everybody may use the empty sender <>.")

    @model_validator(mode="after")
    def _owns_something(self) -> Self:
        if not self.same_address and not self.map and self.file is None:
            raise ValueError("nobody has an address; write map, file or same_address: true")
        if self.file is not None:
            ListFile(self.file, _table)
        return self


class SenderLogin(Stage):
    """Let a logged-in user send with their own addresses only."""

    Settings = SenderLoginSettings
    kind = Kind.GUARD
    never_pass = True
    settings: SenderLoginSettings

    def __init__(self, settings: SenderLoginSettings) -> None:
        super().__init__(settings)
        self._map = _from_map(settings.map)
        self._file = ListFile(settings.file, _table) if settings.file is not None else None

    def mail(self, session: Session, transaction: Transaction) -> Refuse | None:
        """Refuse a sender that is not the user's."""
        user = session.user
        if not user:
            return Refuse(Cause.AUTH_REQUIRED) if self.settings.required else None
        if not transaction.sender:
            return None if self.settings.null_sender else Refuse(Cause.SENDER_DENIED, log="empty sender")
        sender = transaction.sender.lower()
        if self.settings.same_address and sender == user:
            return None
        own = self._map.get(user, set()), self._file.current().get(user, set()) if self._file is not None else set()
        wanted = {sender, f"@{transaction.sender_domain}"}
        if any(not wanted.isdisjoint(addresses) for addresses in own):
            return None
        return Refuse(Cause.SENDER_DENIED)
