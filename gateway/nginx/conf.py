"""nginx's configuration file as directives that know where they stand; includes are followed.

The syntax is nginx-crossplane's, with its own tables of directives switched off: it must read files of versions that
it does not know, and what the mail modules accept is known better here (`directives.py`).
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import crossplane

MAX_INCLUDES = 50
_SKIPPED = frozenset({"http", "stream", "events"})
"""Blocks whose broken includes are not our business."""

_ESCAPE = re.compile(r"""\\(["'\\trn])""")
_ESCAPED = {"t": "\t", "r": "\r", "n": "\n"}
_PLAIN = re.compile(r"[^\s;{}\"'\\#]+")


@dataclass(frozen=True, slots=True)
class Directive:
    """One directive: its words without quotes, where it stands, and what is in its block (None: it has none)."""

    name: str
    arguments: tuple[str, ...]
    file: str
    line: int
    block: tuple[Directive, ...] | None = None

    def __str__(self) -> str:
        words = " ".join((self.name, *map(_quoted, self.arguments)))
        return f"{words};" if self.block is None else f"{words} {{}}"

    @property
    def place(self) -> str:
        """file:line."""
        return f"{self.file}:{self.line}"

    def inside(self, name: str) -> list[Directive]:
        """The directives of this name in the block."""
        return [directive for directive in self.block or () if directive.name == name]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong at a place. `fatal`: nginx would not start with it either, or its meaning is unknown; else it
    is what the gateway has no equal for (`--lenient` goes on), or only a warning."""

    file: str
    line: int
    text: str
    kind: str  # "fatal", "unequal" or "warning"

    @property
    def place(self) -> str:
        """file:line, or the file where no line of it is meant."""
        return f"{self.file}:{self.line}" if self.line else self.file

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class Findings:
    """What was found, in the order of the files; each thing once."""

    def __init__(self) -> None:
        self._found: dict[Finding, None] = {}

    def _add(self, directive: Directive, text: str, kind: str) -> None:
        self._found.setdefault(Finding(directive.file, directive.line, text, kind))

    def fatal(self, directive: Directive, text: str) -> None:
        """nginx refuses it too."""
        self._add(directive, text, "fatal")

    def unequal(self, directive: Directive, text: str) -> None:
        """The gateway has no equal."""
        self._add(directive, text, "unequal")

    def warning(self, directive: Directive, text: str) -> None:
        """It is imported, but somebody should know."""
        self._add(directive, text, "warning")

    def unreadable(self, file: str, line: int | None, text: str) -> None:
        """The file's syntax, or the file itself."""
        self._found.setdefault(Finding(file, line or 0, text, "fatal"))

    def all(self, *kinds: str) -> list[Finding]:
        """Those of these kinds; all without."""
        return [finding for finding in self._found if not kinds or finding.kind in kinds]

    def take(self, other: Findings) -> None:
        """Add another's."""
        self._found |= other._found


class _Statement(TypedDict, total=False):
    """crossplane's form of a directive."""

    directive: str
    line: int
    args: list[str]
    block: list[_Statement]
    includes: list[int]
    comment: str


class _Error(TypedDict):
    """crossplane's form of an error; `callback` is the exception."""

    file: str
    line: int | None
    error: str
    callback: Exception


class _File(TypedDict):
    file: str
    parsed: list[_Statement]


class _Payload(TypedDict):
    errors: list[_Error]
    config: list[_File]


def read(path: Path, findings: Findings) -> tuple[Directive, ...]:
    """The directives of a file with its includes in their place. What cannot be read goes to `findings`."""
    parsed = crossplane.parse(str(path), comments=False, check_ctx=False, check_args=False, onerror=lambda error: error)
    payload = cast(_Payload, parsed)
    for error in payload["errors"]:
        # A file that an include names and that is not there is reported where it is included.
        if not isinstance(error["callback"], OSError) or error["line"] is None:
            findings.unreadable(error["file"], error["line"], _reason(error["callback"]))
    return tuple(_Reader(payload["config"], path, findings).file(0, (), 0))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return str(getattr(error, "strerror", "")) or str(error) or "cannot be read"


class _Reader:
    """Puts includes in their place."""

    def __init__(self, files: list[_File], path: Path, findings: Findings) -> None:
        self._files = files
        self._folder = path.parent
        self._findings = findings

    def file(self, index: int, context: tuple[str, ...], depth: int) -> list[Directive]:
        """The directives of a file, as they stand in this context."""
        file = self._files[index]
        return self._block(file["parsed"], file["file"], context, depth)

    def _block(self, statements: list[_Statement], file: str, context: tuple[str, ...], depth: int) -> list[Directive]:
        found: list[Directive] = []
        for statement in statements:
            name, arguments = statement["directive"], tuple(map(_unescaped, statement["args"]))
            if "comment" in statement:
                continue  # comments between the words of a directive come in spite of comments=False
            if name == "include":
                found += self._include(Directive(name, arguments, file, statement["line"]), statement, context, depth)
                continue
            block = None
            if "block" in statement:
                block = tuple(self._block(statement["block"], file, (*context, name), depth))
            found.append(Directive(_unescaped(name), arguments, file, statement["line"], block))
        return found

    def _include(
        self, directive: Directive, statement: _Statement, context: tuple[str, ...], depth: int
    ) -> list[Directive]:
        if len(directive.arguments) != 1:
            self._findings.fatal(directive, 'invalid number of arguments in "include" directive')
            return []
        included = statement.get("includes", [])
        pattern = directive.arguments[0]
        if not included and not glob.has_magic(pattern) and not _SKIPPED & set(context):
            self._findings.fatal(directive, f"the included file {self._folder / pattern} cannot be read")
        if depth >= MAX_INCLUDES:
            self._findings.fatal(directive, "files include each other without end")
            return []
        return [found for index in included for found in self.file(index, context, depth + 1)]


def _unescaped(word: str) -> str:
    r"""`\"`, `\'`, `\\`, `\t`, `\r`, `\n` as nginx reads them; other backslashes stay."""
    return _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[1]), word) if "\\" in word else word


def _quoted(word: str) -> str:
    if _PLAIN.fullmatch(word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join({"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char, char) for char in escaped) + '"'
