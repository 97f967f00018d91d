"""Add, insert, append, change, rename and delete header fields, by rules.

The rules are applied in their order, each to what the rules before made of the header; each has one of

| action | what it does |
|---|---|
| `add: NAME` | puts a field in front of the message; those of several rules stand in the rules' order |
| `insert: NAME` | puts a field at `index` (0, the default, is the top of the client's own fields) |
| `append: NAME` | puts a field at the end of the header |
| `change: NAMES` | gives fields another value; nothing where there are none |
| `rename: NAMES` | gives fields the name `to`, at their place |
| `delete: NAMES` | removes fields |

NAMES is a name, or a pattern such as `X-Spam-*`, in any case. `change`, `rename` and `delete` concern all fields of
that name; with `matches`, a regular expression, those in whose text it is found; with `occurrence`, one of these (1 is
the topmost, -1 the last). The text is the field's value on one line, as it stands: RFC 2047 words are not decoded.

The new value is `value`, a literal text, or `expression`, a CEL expression over facts. `change` may have `with`
instead, which replaces each match of `matches` (`\\1`, `\\g<name>` are its groups). What an expression gives is cut to
800 characters, with `?` for control characters, and for what is not ASCII unless the message is SMTPUTF8. One that
reads `rcpt` facts has a value for messages to one recipient only: blind copies stay blind. A rule's `when` over `rcpt`
facts holds if it does for one of the recipients.

A message that takes more than 500 changes is refused with 554 5.7.1: nobody writes it but to make work. Nothing skips
these rules, neither an Allow nor an observing mode. If all of them are `add` and nothing in them is known only from the
content, they are decided at DATA, in grade envelope, and filters behind them do not see the fields. Otherwise the
header is read, and the content streams on behind it. Has no helper; where an expression has no value, `on_error`
decides. Write regular expressions that cannot backtrack for long: who sends mail chooses the text.

    stages:
      - headers:
          - {delete: X-Spam-*, when: '!auth.trusted'}
          - {delete: Bcc}
          - {delete: Received, when: auth.trusted}
          - {change: Subject, matches: '^(?!\\[EXT\\])', with: '[EXT] ', when: '!auth.trusted'}
          - {add: X-Gateway-Client, expression: client.address}
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import translate
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gateway import (
    AddHeader,
    AppendHeader,
    Cause,
    ChangeHeader,
    Condition,
    DeleteHeader,
    Edit,
    Expression,
    Header,
    HeaderField,
    InsertHeader,
    Kind,
    Message,
    Operation,
    Phase,
    Refuse,
    Scope,
    Session,
    Settings,
    Stage,
    TextExpression,
    Transaction,
)

MAX_VALUE = 800  # characters that an expression may give: a line has 998 octets (RFC 5322 2.1.1)
MAX_CHANGES = 500  # each costs a walk through the header, which the sender may fill with thousands of fields

_WIDTH = 78  # RFC 5322 2.1.1
_NAME = re.compile(r"[!-9;-~]+")
_WORD = re.compile(r"[ \t]*[^ \t]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_ASCII = re.compile(r"[^ -~]")
_ILLEGAL = re.compile(r"\r\n(?=[ \t])|[\r\n\0]")
_ACTIONS = ("add", "insert", "append", "change", "rename", "delete")
_FINDS = ("change", "rename", "delete")


def _field_name(name: str) -> str:
    if not _NAME.fullmatch(name) or "*" in name or "?" in name:
        raise ValueError(f"{name[:60]!r} is not the name of a header field; write letters, digits and -")
    return name


def _field_pattern(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:60]!r} is not the name of a header field, nor a pattern such as X-Spam-*")
    return name


def _field_text(text: str) -> str:
    if _NOT_ASCII.search(text):
        raise ValueError("a header field holds printable ASCII; write other text as RFC 2047 words (=?utf-8?q?...?=)")
    return text


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text[:60]!r} is not a regular expression: {error}") from None
    return text


_FieldName = Annotated[str, AfterValidator(_field_name)]
_FieldNames = Annotated[str, AfterValidator(_field_pattern)]
_FieldText = Annotated[str, AfterValidator(_field_text)]
_Regex = Annotated[str, AfterValidator(_regular_expression)]


class HeaderRule(BaseModel):
    """One rule: an action with the name of the fields, and what it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    add: _FieldName | None = Field(None, description="Name of a field to put in front of the message.")
    insert: _FieldName | None = Field(None, description="Name of a field to put at `index`.")
    append: _FieldName | None = Field(None, description="Name of a field to put at the end of the header.")
    change: _FieldNames | None = Field(None, description="Name or pattern of the fields that get another value.")
    rename: _FieldNames | None = Field(None, description="Name or pattern of the fields that get the name `to`.")
    delete: _FieldNames | None = Field(None, description="Name or pattern of the fields to remove.")
    when: Condition | None = Field(None, description="Condition of this rule.")
    value: _FieldText | None = Field(None, description="The value, a literal text.")
    expression: TextExpression | None = Field(None, description="The value, an expression over facts.")
    index: int = Field(0, ge=0, description="Where to insert: 0 is the top.")
    to: _FieldName | None = Field(None, description="The new name.")
    matches: _Regex | None = Field(None, description="Regular expression: only fields in whose text it is found.")
    with_: _FieldText | None = Field(None, alias="with", description="What replaces each match of `matches`.")
    occurrence: int | None = Field(None, description="Which of these fields: 1 the topmost, -1 the last; all if unset.")

    @model_validator(mode="after")
    def _is_one_action(self) -> Self:
        actions = [name for name in _ACTIONS if getattr(self, name) is not None]
        if len(actions) != 1:
            raise ValueError(f"has {' and '.join(actions) or 'no action'}; write one of {', '.join(_ACTIONS)}")
        given = {name for name in ("value", "expression", "with_") if getattr(self, name) is not None}
        wanted = 1 if actions[0] not in ("rename", "delete") else 0
        if len(given) != wanted:
            what = "either value or expression" if wanted else "no value"
            raise ValueError(f"{actions[0]} takes {what}{' or with' if actions[0] == 'change' else ''}")
        if (self.to is not None) != (self.rename is not None):
            raise ValueError("rename and to belong together")
        if actions[0] not in _FINDS and (self.matches is not None or self.occurrence is not None or "with_" in given):
            raise ValueError(f"matches, with and occurrence are for {', '.join(_FINDS)}")
        if self.insert is None and "index" in self.model_fields_set:
            raise ValueError("index is for insert")
        if self.occurrence == 0:
            raise ValueError("occurrence counts from 1, or from -1 backwards; leave it out for all")
        self._check_replacement()
        return self

    def _check_replacement(self) -> None:
        if self.with_ is None:
            return
        if self.matches is None:
            raise ValueError("with replaces what matches finds; write matches, or value for the whole")
        try:
            re.compile(self.matches).sub(self.with_, "")
        except (re.error, IndexError) as error:
            raise ValueError(f"with: {error}") from None

    @property
    def action(self) -> str:
        """Which of the actions it is."""
        return next(name for name in _ACTIONS if getattr(self, name) is not None)


class HeadersSettings(Settings):
    """The rules."""

    short_form: ClassVar[str | None] = "rules"

    rules: tuple[HeaderRule, ...] = Field(min_length=1, description="What to do, in this order.")


class Headers(Stage):
    """Add, change and delete header fields by rules."""

    Settings = HeadersSettings
    kind = Kind.PLUMBING
    settings: HeadersSettings

    def __init__(self, settings: HeadersSettings) -> None:
        super().__init__(settings)
        self._names = {
            index: re.compile(translate(name), re.IGNORECASE)
            for index, rule in enumerate(settings.rules)
            if (name := rule.change or rule.rename or rule.delete) is not None
        }
        self._matches = [re.compile(rule.matches) if rule.matches is not None else None for rule in settings.rules]

    def phases(self) -> Sequence[str]:
        """At DATA where nothing but fields in front is wanted, else when the header is there."""
        expressions = [one for rule in self.settings.rules for one in (rule.when, rule.expression) if one is not None]
        early = all(rule.add is not None for rule in self.settings.rules)
        return ["data"] if early and all(one.phase <= Phase.DATA for one in expressions) else ["message"]

    def edits(self, transaction: Transaction) -> Literal["head"]:
        """The header alone."""
        return "head"

    def data(self, session: Session, transaction: Transaction) -> Edit | None:
        """The fields in front."""
        fields = [
            AddHeader(rule.add, value)
            for rule in self.settings.rules
            if rule.add is not None and (value := _value(rule, session, transaction)) is not None
        ]
        return Edit(fields) if fields else None

    async def message(self, session: Session, message: Message) -> Refuse | Edit | None:
        """Apply the rules to a copy of the header, and tell what was done to it."""
        draft = _Draft(await message.headers())
        for index, rule in enumerate(self.settings.rules):
            value = _value(rule, session, message.transaction)
            if value is None:
                continue
            if rule.action in _FINDS:
                draft.change(rule, value, self._names[index], self._matches[index])
            else:
                draft.put(rule, value)
        operations = draft.operations()
        if len(operations) > MAX_CHANGES + len(self.settings.rules):
            return Refuse(Cause.CONTENT, "too many header fields", log=f"{len(operations)} changes to the header")
        return Edit(operations) if operations else None


class _Draft:
    """The header as the rules made it so far, and the operations that make it so.

    The fields in front come last: positions and numbers of the others do not depend on them.
    """

    def __init__(self, header: Header) -> None:
        self._header = header
        self._done: list[Operation] = []
        self._front: list[AddHeader] = []

    def operations(self) -> list[Operation]:
        """What was done; each AddHeader goes above all others, so the topmost is the last."""
        return [*self._done, *reversed(self._front)]

    def put(self, rule: HeaderRule, value: str) -> None:
        """Add, insert or append a field."""
        if rule.add is not None:
            self._front.append(AddHeader(rule.add, value))
        elif rule.insert is not None:
            self._insert(rule.index, rule.insert, value)
        elif rule.append is not None:
            self._done.append(AppendHeader(rule.append, value))
            self._header.append(HeaderField.of(rule.append, value))

    def change(self, rule: HeaderRule, value: str, names: re.Pattern[str], matches: re.Pattern[str] | None) -> None:
        """Change, rename or delete the fields that the rule means, from the last to the first."""
        places = self._places(rule.occurrence, names, matches)
        numbers, total = self._numbers()
        if rule.delete is not None:
            self._delete(places, numbers, total)
            return
        for place in reversed(places):
            field = self._header.fields[place]
            if rule.rename is not None and rule.to is not None:
                self._done.append(DeleteHeader(field.name, numbers[place]))
                del self._header.fields[place]
                self._insert(place, rule.to, field.value.decode("utf-8", "surrogateescape"), leading_space=False)
            elif rule.with_ is not None and matches is not None:
                self._change(place, numbers[place], _folded(field.name, matches.sub(rule.with_, field.text)))
            else:
                self._change(place, numbers[place], value)

    def _places(self, occurrence: int | None, names: re.Pattern[str], matches: re.Pattern[str] | None) -> list[int]:
        places = [
            place
            for place, field in enumerate(self._header.fields)
            if names.match(field.name) and (matches is None or matches.search(field.text))
        ]
        if occurrence is None:
            return places
        chosen = occurrence - 1 if occurrence > 0 else occurrence + len(places)
        return places[chosen : chosen + 1] if chosen >= 0 else []

    def _numbers(self) -> tuple[list[int], Counter[str]]:
        """Which of the fields of its name each is, from 1; and how many there are of each name, in lower case."""
        seen: Counter[str] = Counter()
        numbers = []
        for field in self._header.fields:
            seen[field.name.lower()] += 1
            numbers.append(seen[field.name.lower()])
        return numbers, seen

    def _delete(self, places: list[int], numbers: list[int], total: Counter[str]) -> None:
        """Delete the fields: at once where all of a name are meant, else from the last to the first."""
        fields = self._header.fields
        meant = Counter(fields[place].name.lower() for place in places)
        whole = [name for name in meant if meant[name] == total[name]]
        self._done += [DeleteHeader(name, 0) for name in whole]
        self._done += [
            DeleteHeader(fields[place].name, numbers[place])
            for place in reversed(places)
            if fields[place].name.lower() not in whole
        ]
        gone = set(places)
        self._header.fields = [field for place, field in enumerate(fields) if place not in gone]

    def _insert(self, place: int, name: str, value: str, *, leading_space: bool = True) -> None:
        value = _written(value)
        self._done.append(InsertHeader(place, name, value, leading_space))
        self._header.insert(place, HeaderField.of(name, value, leading_space=leading_space))

    def _change(self, place: int, number: int, value: str) -> None:
        field = self._header.fields[place]
        value = _written(value)
        if field.text != value.replace("\r\n", ""):
            self._done.append(ChangeHeader(field.name, value, number))
            self._header.fields[place] = HeaderField.of(field.name, value)


def _written(value: str) -> str:
    """A value out of a message as a field can hold it: folds stay, lone CR, LF and NUL become blanks."""
    return _ILLEGAL.sub(lambda found: found[0] if found[0] == "\r\n" else " ", value)


def _value(rule: HeaderRule, session: Session, transaction: Transaction) -> str | None:
    """The rule's value here, empty where it has none; None if the rule does not hold."""
    if rule.when is not None and not _holds(rule.when, session, transaction):
        return None
    expression = rule.expression
    if expression is None:
        return rule.value or ""
    recipients = transaction.recipients
    if expression.scope is Scope.RECIPIENT and len(recipients) != 1:
        return None
    text = str(expression.evaluate(session, transaction, recipients[0] if len(recipients) == 1 else None))
    outside = _CONTROL if transaction.smtputf8 else _NOT_ASCII
    return outside.sub("?", text[:MAX_VALUE])


def _holds(when: Expression, session: Session, transaction: Transaction) -> bool:
    if when.scope is Scope.RECIPIENT:
        return any(when.evaluate(session, transaction, recipient) for recipient in transaction.recipients)
    return bool(when.evaluate(session, transaction))


def _folded(name: str, text: str) -> str:
    """The text in lines of up to 78 characters, folded in front of blanks (RFC 5322 2.2.3)."""
    lines, room = [""], _WIDTH - len(name) - len(": ")
    for word in _WORD.findall(text.strip(" \t")):
        if len(lines[-1]) + len(word) > room and lines[-1] and word[0] in " \t":
            lines.append("")
            room = _WIDTH
        lines[-1] += word
    return "\r\n".join(lines)
