"""The log: structlog records, written as JSON lines or as readable text, one write each.

`configure` is called once, by the command that runs; modules get their logger by `get_logger(name)` whenever they
like. A record is a name from `records.RECORDS` and its keys:

    log = get_logger("gateway.smtp")
    log.info("refusal", session=session.id, cause="too_many_connections")

What is promised of every record:

- it is one line and one `write`, so that lines of several processes do not mix, and nothing waits for a file;
- control characters, and those that reorder text on a terminal, are escaped, so that a client cannot forge lines;
- secrets of the configuration (`register_secret`) are replaced in every string. Passwords of users never come
  here in the first place: they are in no object that is logged.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping, MutableMapping
from typing import Final, Literal, TextIO, cast

import msgspec
import structlog
from structlog.typing import FilteringBoundLogger

Format = Literal["json", "text", "auto"]
Level = Literal["debug", "info", "warning", "error", "critical"]

REDACTED: Final = "[redacted]"
MAX_SECRETS: Final = 1000
SHORT_SECRET: Final = 4
"""Secrets shorter than this are replaced only where they are the whole string: they occur in everything."""

_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50, "exception": 40}
_UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_NEEDS_QUOTES: Final = re.compile(r'[\x00-\x20"=\\]|^$')
_HEAD: Final = frozenset(("time", "level", "logger", "record"))
_encode = msgspec.json.Encoder(enc_hook=str).encode


# -- secrets ---------------------------------------------------------------------------------------------------

_secrets: list[str] = []
_secret_bytes: list[bytes] = []  # as they look inside an encoded record


def register_secret(secret: str) -> None:
    """Never write `secret` to the log. For values of the configuration; raises ValueError beyond MAX_SECRETS."""
    if not secret or secret in _secrets:
        return
    if len(_secrets) >= MAX_SECRETS:
        raise ValueError(f"more than {MAX_SECRETS} secrets in the configuration")
    _secrets.append(secret)
    _secrets.sort(key=len, reverse=True)  # one that contains another is replaced first
    _secret_bytes.append(_encode(secret)[1:-1])


def forget_secrets() -> None:
    """Forget all registered secrets: a new configuration registers its own."""
    _secrets.clear()
    _secret_bytes.clear()


def redact(value: str) -> str:
    """`value` with every registered secret in it replaced."""
    for secret in _secrets:
        if secret in value and (len(secret) >= SHORT_SECRET or value == secret):
            value = value.replace(secret, REDACTED)
    return value


def _redacted(value: object) -> object:
    """`redact` for every string of a decoded JSON value."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(key): _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return value


# -- rendering -------------------------------------------------------------------------------------------------


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


class _Clock:
    """RFC 3339 times in UTC with milliseconds; the part above a second is made once a second."""

    __slots__ = ("_prefix", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._prefix = ""

    def text(self, now: float) -> str:
        second = int(now)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        return f"{self._prefix}{int((now - second) * 1000):03d}Z"


def _as_text(record: Mapping[str, object]) -> bytes:
    """`time LEVEL name key=value ...` for people; strings with blanks are quoted, lists are JSON."""
    words = [str(record["time"]), f"{str(record['level']).upper():7}", str(record["record"])]
    trace = ""
    for key, value in record.items():
        if key == "exception":  # indented, so that no text in it looks like a record of its own
            trace = _UNSAFE.sub(_escape, "".join(f"\n    {line}" for line in str(value).split("\n")))
        elif isinstance(value, str) and not _NEEDS_QUOTES.search(value):
            if key not in _HEAD:
                words.append(f"{key}={value}")
        elif key not in _HEAD:
            words.append(f"{key}={_encode(value).decode()}")
    return (" ".join(words) + trace).encode()


class _Output:
    """Where records go and how they look; one for the process."""

    def __init__(self) -> None:
        self.format: Literal["json", "text"] = "json"
        self.threshold = _LEVELS["info"]
        self.file: str | None = None
        self.descriptor = 2
        self.lost = 0
        self.error = ""
        self._torn = False  # the last write ended inside a line
        self._owned = False
        self._clock = _Clock()

    def open(self, file: str | None, stream: TextIO | io.BufferedIOBase | None) -> None:
        """Write to a file (opened to append), or to a stream's descriptor, or to standard error."""
        if file is not None:
            descriptor, owned = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640), True
        else:
            descriptor, owned = (stream or sys.__stderr__ or sys.stderr).fileno(), False
        self.close()
        self.file, self.descriptor, self._owned = file, descriptor, owned

    def close(self) -> None:
        """Close the file if it is ours, and go back to standard error."""
        if self._owned:
            os.close(self.descriptor)
        self.file, self.descriptor, self._owned = None, 2, False

    def render(self, logger: _Named, method: str, event: MutableMapping[str, object]) -> bytes:
        """The one structlog processor: from a record's keys to its line."""
        if _LEVELS[method] < self.threshold:
            raise structlog.DropEvent
        record: dict[str, object] = {
            "time": self._clock.text(time.time()),
            "level": "error" if method == "exception" else method,
            "logger": logger.name,
            "record": event.pop("event"),
        }
        if event.get("exc_info"):
            event["exception"] = _traceback(event["exc_info"])
        for key, value in event.items():
            if value is None or key == "exc_info":
                continue
            if type(value) is bytes:
                value = value.decode("utf-8", "backslashreplace")
            record[f"{key}_" if key in _HEAD else key] = value
        return self._line(record)

    def _line(self, record: dict[str, object]) -> bytes:
        try:
            line = _encode(record)
        except (TypeError, ValueError, OverflowError):
            record = cast("dict[str, object]", _encodable(record))
            line = _encode(record)
        for secret in _secret_bytes:
            if secret in line:
                plain = msgspec.json.decode(line)
                record = {key: item if key in _HEAD else _redacted(item) for key, item in plain.items()}
                line = _encode(record)
                break
        if self.format == "text":
            line = _as_text(record)
        if not line.isascii() or b"\x7f" in line:
            line = _UNSAFE.sub(_escape, line.decode()).encode()
        return line

    def write(self, line: bytes) -> None:
        """Write one line. What cannot be written is counted, and said once writing works again."""
        data = line + b"\n"
        if self.lost:
            notice = self._line({"time": self._clock.text(time.time()), "level": "error", "logger": "gateway.log",
                                 "record": "lost_records", "count": self.lost, "error": self.error})
            data = b"%b%b\n%b" % (b"\n" if self._torn else b"", notice, data)
        written = 0
        try:
            while written < len(data):
                written += os.write(self.descriptor, data[written:] if written else data)
        except OSError as error:
            self.lost += 1
            self.error = error.strerror or str(error)
            self._torn = self._torn or written > 0
        else:
            self.lost, self._torn = 0, False


class _Named:
    """A logger's name, and the methods that structlog calls with a rendered line."""

    __slots__ = ("name",)

    def __init__(self, name: str = "gateway") -> None:
        self.name = name

    def write(self, line: bytes) -> None:
        _output.write(line)

    debug = info = warning = error = critical = exception = write


def _traceback(exc_info: object) -> str:
    error = exc_info if isinstance(exc_info, BaseException) else sys.exc_info()[1]
    return "".join(traceback.format_exception(error)).rstrip() if error is not None else ""


_output = _Output()
_PROCESSORS: Final = [_output.render]


# -- set-up ----------------------------------------------------------------------------------------------------


def configure(
    format: Format = "auto",
    level: Level = "info",
    *,
    file: str | None = None,
    stream: TextIO | io.BufferedIOBase | None = None,
) -> None:
    """Say how and where to log: to `file`, else to `stream` (which must have a descriptor), else to standard error.

    `auto` is text on a terminal and JSON elsewhere. May be called again; loggers got earlier follow. Raises OSError
    if the file cannot be opened; the log then stays what it was.
    """
    _output.open(file, stream)
    _output.format = ("text" if os.isatty(_output.descriptor) else "json") if format == "auto" else format
    _output.threshold = _LEVELS[level]
    structlog.configure(
        processors=_PROCESSORS,
        wrapper_class=structlog.make_filtering_bound_logger(0),
        logger_factory=_Named,
        cache_logger_on_first_use=True,
    )


def reopen() -> None:
    """Open the log file again, after it was moved away (logrotate). Raises OSError; the old one then stays."""
    if _output.file is not None:
        _output.open(_output.file, None)


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger; its name is in every record. It may be got before `configure`, which it then follows."""
    return cast("FilteringBoundLogger", structlog.get_logger(name))
