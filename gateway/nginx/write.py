"""YAML with comments: pipeline documents as they are printed.

Only what pipeline files need: mappings in block form, lists of plain values in one line, comments above and behind.
What pipeline files expand (`${...}`) is escaped, so that every text stays what it was in nginx's file.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, Union

WIDTH = 118

Scalar: TypeAlias = str | int | float | bool
Value: TypeAlias = Union[Scalar, "Map", Sequence[Union[Scalar, "Map"]]]

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@%+:-]*(?: [A-Za-z0-9_./@%+-][A-Za-z0-9_./@%+:-]*)*")
_NUMBER_LIKE = re.compile(r"\d+(?:\.\d+)?(?:ms|[smhdkMGg])")
_MEANT = re.compile(r"(?i)true|false|null|\.inf|\.nan")
_REFERENCE = re.compile(r"\$(?=[${])")


@dataclass
class Entry:
    """A key with its value, a comment behind it and comments above."""

    key: str
    value: Value
    comment: str = ""
    above: tuple[str, ...] = ()


@dataclass
class Map:
    """A mapping in the order of writing."""

    entries: list[Entry] = field(default_factory=list)

    def put(self, key: str, value: Value, comment: str = "", above: Iterable[str] = ()) -> Map:
        """Add a key; `comment` stands behind it, `above` before it."""
        self.entries.append(Entry(key, value, comment, tuple(above)))
        return self

    def get(self, key: str) -> Value | None:
        """The value of a key."""
        return next((entry.value for entry in self.entries if entry.key == key), None)

    def __bool__(self) -> bool:
        return bool(self.entries)


def comment(text: str) -> list[str]:
    """A text as comment lines."""
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return [f"# {line}" for line in textwrap.wrap(clean, WIDTH, break_long_words=False, break_on_hyphens=False)]


def document(content: Map, head: Iterable[str] = ()) -> str:
    """A YAML document without its `---`: comment paragraphs, then the mapping."""
    lines = [line for text in head for line in comment(text)]
    return "\n".join([*lines, *_block(content, "")]) + "\n"


def _block(content: Map, indent: str) -> list[str]:
    lines: list[str] = []
    for entry in content.entries:
        lines += [indent + line for text in entry.above for line in comment(text)]
        lines += _entry(entry, indent)
    return lines


def _entry(entry: Entry, indent: str) -> list[str]:
    key = _text(entry.key)
    value = entry.value
    behind = f"  {' '.join(comment(entry.comment)).replace(' # ', ' ')}" if entry.comment else ""
    if isinstance(value, Map):
        if not value:
            return [f"{indent}{key}: {{}}{behind}"]
        return [f"{indent}{key}:{behind}", *_block(value, indent + "  ")]
    if isinstance(value, (str, int, float)):
        return [f"{indent}{key}: {_scalar(value)}{behind}"]
    if not any(isinstance(item, Map) for item in value):
        line = f"{indent}{key}: [{', '.join(_scalar(item) for item in value if not isinstance(item, Map))}]"
        return [f"{line}{behind}"]
    lines = [f"{indent}{key}:{behind}"]
    for item in value:
        lines += _item(item, indent + "  ")
    return lines


def _item(item: Scalar | Map, indent: str) -> list[str]:
    if not isinstance(item, Map):
        return [f"{indent}- {_scalar(item)}"]
    above = [indent + line for text in item.entries[0].above for line in comment(text)]
    first, *rest = _block(Map([Entry(e.key, e.value, e.comment, e.above if i else ())
                               for i, e in enumerate(item.entries)]), indent + "  ")  # fmt: skip
    return [*above, f"{indent}- {first.lstrip()}", *rest]


def _scalar(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # `$` before `$` or `{` would be expanded
    return _text(_REFERENCE.sub("$$", value)) if isinstance(value, str) else repr(value)


def _text(text: str) -> str:
    """A text in quotes where it needs them."""
    if len(text) < 200 and (_PLAIN.fullmatch(text) or _NUMBER_LIKE.fullmatch(text)):
        if not _MEANT.fullmatch(text) and not text.endswith(":") and ": " not in text:
            return text
    if '"' in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    return '"' + "".join(map(_character, text)) + '"'


def _character(char: str) -> str:
    """A character between double quotes; what cannot be printed as its number (YAML 1.2, 5.7)."""
    if char in '"\\':
        return f"\\{char}"
    if "\ud800" <= char <= "\udfff":
        return "?"
    return char if char.isprintable() else f"\\U{ord(char):08x}"
