"""Allow and deny by lists: of client networks, HELO names, senders, recipients, users; inline or in files.

The most specific entry of all four lists decides; where an allow and a deny are equally specific, the deny does. What
is in no list goes on to the next stage. An allow skips later checks (never guards): for the session when the client or
HELO is matched, for the message when sender or user is, for the recipient when that is.

- `match: client`: networks or addresses; the longest prefix wins;
- the others: `user@example.org`, then `example.org`, then `.example.org` (all below it, the longest first), then
  `user@`; `<>` is the empty sender. A HELO name is matched as a domain, a user as typed, in lower case.

`for: session` (default for client and HELO) decides once, in `connect` or `helo`, where a refusal waits for RCPT
(`refuse_at: now` says it at once) and a login clears it. `for: phase` (default for the others) decides at each MAIL
or RCPT anew, so that a changed file holds for sessions that already run, and an allow is for that message only.

A file has one entry a line, with `#` for comments, and is re-read within a second after it changed; one that becomes
unreadable keeps its old content, with a warning. Behind an entry may stand the text that the client reads. A check, so
that an earlier Allow skips it, as with Postfix's access maps. Costs a few dictionary look-ups however long the lists.

    stages:
      - access: {deny: [192.0.2.0/24, {match: 198.51.100.7, text: write to abuse@example.org}], allow: [192.0.2.7]}
      - access: {id: senders, match: sender, deny_file: lists/senders, allow: [partner.example]}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from gateway import (
    Allow,
    Cause,
    ExistingFile,
    Kind,
    ListFile,
    NameTable,
    NetworkTable,
    Recipient,
    Refuse,
    Session,
    Settings,
    Stage,
    Transaction,
)

Match = Literal["client", "helo", "sender", "recipient", "user"]

_PHASES: dict[tuple[str, str], str] = {
    ("client", "session"): "connect",
    ("client", "phase"): "mail",
    ("helo", "session"): "helo",
    ("helo", "phase"): "mail",
    ("sender", "phase"): "mail",
    ("recipient", "phase"): "rcpt",
    ("user", "phase"): "mail",
}


class _Table(Protocol):
    """Patterns, each with the text for the client."""

    def add(self, pattern: str, value: str) -> None: ...
    def find(self, name: str, /) -> tuple[int, str] | None: ...


class Entry(BaseModel):
    """One entry: what it matches, and what a client that is refused reads instead of the usual text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str = Field(description="A network, address, domain, .domain or user@.")
    text: str = Field("", description="Text of the refusal.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if isinstance(value, str):
            match, _, text = value.strip().partition(" ")
            return {"match": match, "text": text.strip()}
        return value


_Entries = Annotated[
    tuple[Entry, ...],
    WithJsonSchema({"type": "array", "items": {"anyOf": [{"type": "string"}, Entry.model_json_schema()]}}),
]


class AccessSettings(Settings):
    """The lists, and what they are matched with."""

    short_form: ClassVar[str | None] = "deny_file"

    match: Match = Field("client", description="What the entries are matched with.")
    deny: _Entries = Field((), description="Entries that are refused.")
    allow: _Entries = Field((), description="Entries that skip later checks.")
    deny_file: ExistingFile | None = Field(None, description="A file of such entries, one a line, with optional text.")
    allow_file: ExistingFile | None = Field(None, description="A file of such entries, one a line.")
    for_: Literal["session", "phase"] | None = Field(
        None,
        alias="for",
        description="Decide once a session (default for client, helo) or at each MAIL or RCPT (default for the rest).",
    )

    @field_validator("deny", "allow")
    @classmethod
    def _are_patterns(cls, entries: tuple[Entry, ...], info: ValidationInfo) -> tuple[Entry, ...]:
        if "match" in info.data:
            _inline(info.data["match"], entries)
        return entries

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not (self.deny or self.allow or self.deny_file or self.allow_file):
            raise ValueError("lists nothing; write deny, allow, deny_file or allow_file")
        if self.for_ == "session" and self.match not in ("client", "helo"):
            raise ValueError(f"for: session is for client and helo; a {self.match} is matched each time")
        _Lists(self.match, self.deny, self.deny_file)
        _Lists(self.match, self.allow, self.allow_file)
        return self


class Access(Stage):
    """Allow and deny by lists of networks, HELO names, senders, recipients or users."""

    Settings = AccessSettings
    kind = Kind.CHECK
    settings: AccessSettings

    def __init__(self, settings: AccessSettings) -> None:
        super().__init__(settings)
        self._denied = _Lists(settings.match, settings.deny, settings.deny_file)
        self._allowed = _Lists(settings.match, settings.allow, settings.allow_file)

    @property
    def first_only(self) -> bool:
        """A session has one user: later MAILs need not be read for it."""
        return self.settings.match == "user"

    def phases(self) -> Sequence[str]:
        """The one phase in which the lists are asked."""
        match = self.settings.match
        default = "session" if match in ("client", "helo") else "phase"
        return [_PHASES[match, self.settings.for_ or default]]

    def connect(self, session: Session) -> Refuse | Allow | None:
        """The client's address, once."""
        return self._decide(session.client.address)

    def helo(self, session: Session, name: str) -> Refuse | Allow | None:
        """The HELO name, whenever one is given."""
        return self._decide(name)

    def mail(self, session: Session, transaction: Transaction) -> Refuse | Allow | None:
        """The sender or user; client and HELO name with `for: phase`."""
        match self.settings.match:
            case "sender":
                return self._decide(transaction.sender or "<>")
            case "user":
                return self._decide(session.user)
            case "helo":
                return self._decide(session.helo)
            case _:
                return self._decide(session.client.address)

    def rcpt(self, session: Session, recipient: Recipient) -> Refuse | Allow | None:
        """The recipient."""
        return self._decide(recipient.address)

    def _decide(self, subject: str) -> Refuse | Allow | None:
        if not subject:
            return None
        denied, allowed = self._denied.find(subject), self._allowed.find(subject)
        if denied is not None and (allowed is None or denied[0] >= allowed[0]):
            return Refuse(Cause.ACCESS_DENIED, text=denied[1], log=f"{self.settings.match} {subject} is denied")
        if allowed is not None:
            return Allow(f"{self.settings.match} {subject} is allowed")
        return None


class _Lists:
    """The inline entries and the file of one side."""

    def __init__(self, match: Match, entries: tuple[Entry, ...], file: ExistingFile | None) -> None:
        self._inline = _inline(match, entries)
        self._file = ListFile(file, lambda lines: _table(match, lines)) if file is not None else None

    def find(self, subject: str) -> tuple[int, str] | None:
        """How specific the best entry is, and its text."""
        found = self._inline.find(subject)
        if self._file is None:
            return found
        other = self._file.current().find(subject)
        return max((one for one in (found, other) if one is not None), default=None)


def _new_table(match: Match) -> _Table:
    if match == "client":
        return NetworkTable[str]()
    return NameTable[str]()


def _inline(match: Match, entries: Iterable[Entry]) -> _Table:
    """Raises ValueError for an entry that is none, or text that no reply can carry."""
    table = _new_table(match)
    for entry in entries:
        table.add(entry.match, _checked(entry.text))
    return table


def _table(match: Match, lines: Iterable[str]) -> _Table:
    table = _new_table(match)
    for line in lines:
        pattern, *text = line.split(None, 1)
        table.add(pattern, _checked(text[0] if text else ""))
    return table


def _checked(text: str) -> str:
    if not text.isascii() or not (text.isprintable() or not text) or len(text) > 400:
        raise ValueError(f"{text[:60]!r} cannot stand in a reply; write one line of ASCII, at most 400 characters")
    return text
