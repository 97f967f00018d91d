"""What a record looks like: one JSON object, or one line for people. The same for every place it goes to.

What is promised of every line: control characters, and those that reorder text on a terminal, are escaped, so that a
client cannot forge lines; secrets of the configuration are replaced in every string.
"""

from __future__ import annotations

import os
import re
import string
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Final, Literal, cast

import msgspec

from gateway.observe.records import RECORDS
from gateway.observe.redaction import encoded_secrets, redacted

Format = Literal["json", "text"]
Record = dict[str, object]
Render = Callable[[Record, float], bytes]
"""From a record and the time it was written (seconds since 1970) to its line, without the line's end."""

pipeline: Final[ContextVar[str]] = ContextVar("pipeline", default="")
"""Name of the pipeline whose session, or other task, runs here; set once at the start of the task."""
listener: Final[ContextVar[str]] = ContextVar("listener", default="")
"""Name of the listener that the session came in at; set once at the start of its task."""

HEAD: Final = frozenset(("time", "level", "logger", "record"))
_UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_UNSAFE_IN_LINE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_NEEDS_QUOTES: Final = re.compile(r'[\x00-\x20",\\]|^$')
_SAID: Final = frozenset(("user", "helo", "sender", "recipient"))
"""What a client said is always in quotes."""
_encode: Final = msgspec.json.Encoder(enc_hook=str).encode


class Clock:
    """Times as text; the part that changes once a second is made once a second."""

    __slots__ = ("_make", "_second", "_text")

    def __init__(self, make: Callable[[int], str]) -> None:
        self._make = make
        self._second = -1
        self._text = ""

    def text(self, now: float) -> str:
        """The second that `now` (since 1970) is in."""
        second = int(now)
        if second != self._second:
            self._second, self._text = second, self._make(second)
        return self._text

    def rfc3339(self, now: float) -> str:
        """The same with milliseconds, for a time in UTC."""
        second = int(now)
        if second != self._second:
            self._second, self._text = second, self._make(second)
        return f"{self._text}{int((now - second) * 1000):03d}Z"


_local: Final = Clock(lambda second: time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(second)))
rfc3339: Final = Clock(lambda second: time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))).rfc3339
"""A time (since 1970) in UTC with milliseconds, as RFC 3339 writes it."""


# -- JSON ------------------------------------------------------------------------------------------------------


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def _encodable(value: object) -> object:
    """A value that JSON can say, for what it refuses: lone surrogates, huge numbers, keys that are no strings."""
    if isinstance(value, Mapping):
        return {str(_encodable(key)): _encodable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_encodable(item) for item in value]
    if value is None or isinstance(value, (bool, float)):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()


def _clean(record: Record) -> tuple[bytes, Record]:
    """The record in JSON and as it is, both without secrets."""
    try:
        line = _encode(record)
    except (TypeError, ValueError, OverflowError):
        record = cast("Record", _encodable(record))
        line = _encode(record)
    for secret in encoded_secrets:
        if secret in line:
            plain = msgspec.json.decode(line)
            record = {key: item if key in HEAD else redacted(item) for key, item in plain.items()}
            line = _encode(record)
            break
    return line, record


def as_json(record: Record, now: float) -> bytes:
    """One JSON object."""
    try:  # as `_clean`, which costs a call more
        line = _encode(record)
    except (TypeError, ValueError, OverflowError):
        line, record = _clean(record)
    for secret in encoded_secrets:
        if secret in line:
            line, record = _clean(record)
            break
    if not line.isascii() or b"\x7f" in line:
        line = _UNSAFE.sub(_escape, line.decode()).encode()
    return line


# -- text ------------------------------------------------------------------------------------------------------


def as_text(record: Record, now: float) -> bytes:
    """`2026/11/21 10:00:00 [info] 1234: *7KQ2-M9X client logged in, client: 192.0.2.1, user: "tim"`, in local time.

    A traceback follows in indented lines, so that no text in it looks like a record of its own.
    """
    _, record = _clean(record)
    trace = ""
    if "exception" in record:
        lines = str(record["exception"]).split("\n")
        trace = "".join(f"\n    {_UNSAFE_IN_LINE.sub(_escape, line)}" for line in lines)
    return f"{_local.text(now)} [{record['level']}] {os.getpid()}: {_sentence(record)}{trace}".encode()


def as_sentence(record: Record, now: float) -> bytes:
    """As in `as_text`, but without what syslog says itself: time, level and process. Of a traceback the last line."""
    _, record = _clean(record)
    text = _sentence(record)
    if "exception" in record:
        last = str(record["exception"]).rstrip().rpartition("\n")[2]
        text = f"{text}, exception: {_UNSAFE_IN_LINE.sub(_escape, _encode(last).decode())}"
    return text.encode()


_FIELDS: Final = {
    name: frozenset(field for _, field, _, _ in string.Formatter().parse(spec.text) if field)
    for name, spec in RECORDS.items()
}


def _sentence(record: Record) -> str:
    """What happened, to whom, then the other keys in their order."""
    name = str(record["record"])
    spec, used = RECORDS.get(name), _FIELDS.get(name, frozenset())
    words = name.replace("_", " ")
    if spec is not None and spec.text and used <= record.keys():
        words = spec.text.format_map({key: str(record[key]) for key in used}) if used else spec.text
    pairs = [words]
    if "client" in record:
        pairs.append(f"client: {_value('client', record['client'])}")
    place = record.get("listener") or listener.get()
    if place:
        pairs.append(f"listener: {_value('listener', place)}")
    for key, value in record.items():
        if key not in _ELSEWHERE and key not in used:
            pairs.append(f"{key}: {_value(key, value)}")
    session = f"*{record['session']} " if "session" in record else ""
    return _UNSAFE_IN_LINE.sub(_escape, session + ", ".join(pairs))


_ELSEWHERE: Final = HEAD | {"session", "client", "listener", "exception"}


def _value(key: str, value: object) -> str:
    """Strings are in quotes where a client said them or where they would not end visibly; lists are JSON."""
    if isinstance(value, str) and key not in _SAID and not _NEEDS_QUOTES.search(value):
        return value
    return _encode(value).decode()
