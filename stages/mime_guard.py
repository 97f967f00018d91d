"""Refuse or mark messages by their parts: file names, content types, nesting, number, and malformed MIME.

Each part is looked at as soon as its header has come, also within attached messages (message/rfc822). What is found:

- `extensions`: what a file name ends in; by default those of programs that Windows runs at a click;
- `names`: patterns of whole file names, such as `invoice*.zip`;
- `disguised`: a program behind a second extension (`invoice.pdf.exe`, also where `extensions` leaves `exe` out), or a
  name that is written backwards (U+202E);
- `types`: content types or patterns of them, such as `application/x-ms*`;
- `defects`: MIME that mail readers read differently, `refuse` for all, `pass` for none, or a list of `bare_cr`,
  `bare_lf`, `duplicate_field`, `duplicate_parameter`, `encoded_composite`, `junk_behind_boundary`, `long_boundary`,
  `malformed_field`, `malformed_parameter`, `no_boundary`, `no_separator`, `nul`, `part_behind_end`, `reused_boundary`,
  `unclosed`. The default are those behind which a part may stay unseen; much honest mail has some of the others;
- `max_depth`, `max_parts`: nesting and number. A part header of more than 32 KiB is found, too.

Names are compared in every way in which they can be read: of Content-Disposition and Content-Type, with RFC 2231 and
RFC 2047 decoded and not, without folders, invisible characters, and the dots and blanks that Windows drops at the end.
Case does not matter. What is inside of archives (zip and others), TNEF (`winmail.dat`), encrypted parts and uuencoded
text is not opened: refuse their extensions, or ask a virus scanner.

`action: refuse` refuses the message with 554 5.7.1 at the first finding, without reading further. `action: header` lets
it pass with a field in front that says what was found; fields of that name that were there before are removed.

A check, so that an earlier Allow skips it. The content streams through, and no more than part headers is kept. To
refuse does not hold up the message; to mark holds it back until its end was seen. Has no helper.

    stages:
      - mime_guard
      - mime_guard:
          extensions: [exe, scr, js, vbs, lnk, iso, img]
          types: [application/x-msdownload, message/partial]
          action: header
          when: auth.trusted
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fnmatch import translate
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from gateway import (
    AddHeader,
    Cause,
    DeleteHeader,
    Edit,
    Edits,
    Kind,
    Message,
    Refuse,
    Session,
    Settings,
    Stage,
    Transaction,
)
from gateway.protocol.mime import MimeLimits, MimeScanner, Part
from gateway.protocol.mime_fields import Defect

PROGRAMS = (
    "ade", "adp", "app", "appx", "bat", "chm", "cmd", "com", "cpl", "dll", "exe", "hta", "ins", "isp", "jar", "js",
    "jse", "lib", "lnk", "mde", "msc", "msi", "msix", "msp", "mst", "pif", "ps1", "reg", "scr", "sct", "shb", "sys",
    "vb", "vbe", "vbs", "vxd", "wsc", "wsf", "wsh",
)  # fmt: skip
"""Extensions of files that Windows runs when they are opened."""

MAX_TOLD = 5  # findings that a field names

_LIMITS = (Defect.OVER_DEPTH, Defect.OVER_PARTS, Defect.OVER_HEADER)
_DEFECTS = {defect.name.lower(): defect for defect in Defect if defect not in _LIMITS}
_UNSEEN = ("duplicate_field", "encoded_composite", "no_boundary", "nul")
_DROPPED = " .\t\r\n\"'"  # what Windows, or a mail reader, drops at the end of a name
_BACKWARDS = re.compile("[\u202d\u202e]")
_SHORT = re.compile(r"[a-z0-9]{1,5}")
_FIELD_NAME = re.compile(r"[A-Za-z0-9-]+")


def _extension(text: str) -> str:
    bare = text.strip().lower().removeprefix("*").removeprefix(".")
    if not re.fullmatch(r"[^\s.*?/\\]+", bare):
        raise ValueError(f"{text[:60]!r} is not an extension; write exe, or *.exe in names")
    return bare


def _type_pattern(text: str) -> str:
    if text.count("/") != 1 or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{text[:60]!r} is not a content type; write application/zip or application/x-ms*")
    return text.lower()


def _field_name(text: str) -> str:
    if not _FIELD_NAME.fullmatch(text):
        raise ValueError(f"{text[:60]!r} is not the name of a header field; write letters, digits and -")
    return text


def _named_defects(value: object) -> object:
    if value == "refuse":
        return tuple(_DEFECTS)
    return () if value == "pass" else value


def _defect(name: str) -> str:
    if name not in _DEFECTS:
        raise ValueError(f"{name[:60]!r} is no defect; write refuse, pass, or a list of {', '.join(_DEFECTS)}")
    return name


_Extensions = tuple[Annotated[str, AfterValidator(_extension)], ...]
_Types = tuple[Annotated[str, AfterValidator(_type_pattern)], ...]
_Defects = Annotated[
    tuple[Annotated[str, AfterValidator(_defect)], ...],
    BeforeValidator(_named_defects),
    WithJsonSchema({"anyOf": [{"enum": ["refuse", "pass"]}, {"type": "array", "items": {"enum": list(_DEFECTS)}}]}),
]


class MimeGuardSettings(Settings):
    """What is not wanted, and what happens to a message that has it."""

    short_form: ClassVar[str | None] = "extensions"

    extensions: _Extensions = Field(PROGRAMS, description="What names of files may not end in, without a dot.")
    names: tuple[str, ...] = Field((), description="Patterns of file names that are not wanted, such as invoice*.zip.")
    disguised: bool = Field(True, description="Find programs with a second extension, and names written backwards.")
    types: _Types = Field(("message/partial",), description="Content types, or patterns of them, that are not wanted.")
    defects: _Defects = Field(_UNSEEN, description="Malformed MIME that is not wanted: refuse, pass, or a list.")
    max_depth: int = Field(20, ge=1, le=100, description="Levels of parts within parts.")
    max_parts: int = Field(1000, ge=1, le=100_000, description="Parts of a message.")
    action: Literal["refuse", "header"] = Field("refuse", description="Refuse the message, or mark it with a field.")
    header: Annotated[str, AfterValidator(_field_name)] = Field(
        "X-Mime-Guard", description="Name of the field that marks."
    )


class MimeGuard(Stage):
    """Refuse or mark messages by the names and types of their parts, and malformed MIME."""

    Settings = MimeGuardSettings
    kind = Kind.CHECK
    settings: MimeGuardSettings

    def __init__(self, settings: MimeGuardSettings) -> None:
        super().__init__(settings)
        self._extensions = frozenset(settings.extensions)
        self._names = [(pattern, re.compile(translate(pattern.lower()))) for pattern in settings.names]
        self._types = [(pattern, re.compile(translate(pattern))) for pattern in settings.types]
        self._defects = frozenset([*_LIMITS, *(_DEFECTS[name] for name in settings.defects)])

    def edits(self, transaction: Transaction) -> Edits:
        """A field in front, if that is what is done."""
        return "head" if self.settings.action == "header" else "none"

    async def message(self, session: Session, message: Message) -> Refuse | Edit | None:
        """Look at each part as it comes."""
        header = await message.headers()
        scanner = MimeScanner(MimeLimits(self.settings.max_depth, self.settings.max_parts))
        found: dict[str, None] = {}
        known = self._look(scanner, scanner.start(header), 0, found)
        if not (found and self.settings.action == "refuse"):
            async for block in message.blocks():
                known = self._look(scanner, scanner.feed(block), known, found)
                if found and self.settings.action == "refuse":
                    break
            else:
                self._look(scanner, scanner.finish(), known, found)
        if self.settings.action == "refuse":
            return Refuse(Cause.CONTENT, f"{next(iter(found))} is not accepted") if found else None
        name = self.settings.header
        forged = [DeleteHeader(name, 0)] if header.count(name) else []
        marks = [AddHeader(name, ";\r\n\t".join(list(found)[:MAX_TOLD]))] if found else []
        return Edit([*forged, *marks]) if forged or marks else None

    def _look(self, scanner: MimeScanner, parts: list[Part], known: int, found: dict[str, None]) -> int:
        """Add in words what is not wanted of new parts and defects; the number of defects that are known now."""
        for part in parts:
            found.update(dict.fromkeys(self._of_part(part)))
        for one in scanner.defects[known:]:
            if one.defect in self._defects:
                found[f"malformed MIME: {one.defect.value}"] = None
        return len(scanner.defects)

    def _of_part(self, part: Part) -> Iterator[str]:
        for pattern, types in self._types:
            if any(types.match(content_type) for content_type in part.content_types):
                yield f"content type {pattern}"
        for name in part.names:
            if self.settings.disguised and _BACKWARDS.search(name):
                yield "file name written backwards"
            for reading in _readings(name):
                yield from self._of_name(reading)

    def _of_name(self, name: str) -> Iterator[str]:
        pieces = [piece.strip() for piece in name.split(".")]
        if len(pieces) > 1 and pieces[-1] in self._extensions:
            yield f"file named *.{_shown(pieces[-1])}"
        elif self.settings.disguised and len(pieces) > 2 and pieces[-1] in PROGRAMS and _SHORT.fullmatch(pieces[-2]):
            yield f"file named *.*.{pieces[-1]}"
        for pattern, names in self._names:
            if names.match(name):
                yield f"file named {_shown(pattern)}"


def _readings(name: str) -> set[str]:
    """The file name as programs may understand it, in lower case."""
    plain = unicodedata.normalize("NFKC", name).lower()
    visible = "".join(one for one in plain if one == "\0" or unicodedata.category(one) not in ("Cf", "Cc"))
    wholes = {plain, visible, visible.partition("\0")[0], visible.partition(":")[0]}
    bases = {re.split(r"[/\\]", whole.rstrip("/\\"))[-1] for whole in wholes}
    return {base.replace("\0", "").rstrip(_DROPPED) for base in bases}


def _shown(text: str) -> str:
    """A pattern of the configuration as a reply and a field can hold it."""
    return re.sub(r"[^!-~]", "?", text)
