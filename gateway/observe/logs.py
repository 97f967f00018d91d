"""The log: structlog records, each to the sinks of its listener, its pipeline or the process.

`configure` or `route` is called once, by the command that runs; modules get their logger by `get_logger(name)`
whenever they like. A record is a name from `records.RECORDS` and its keys:

    log = get_logger("gateway.smtp")
    log.info("refusal", session=session.id, cause="too_many_connections")

A session's task says once whose it is, `pipeline.set(name)` and `listener.set(name)`; its records, and those of the
tasks it starts, then have a `pipeline` and find their way. What a line looks like: `lines.py`; where it goes:
`sinks.py` and `syslog.py`; what is never shown: `redaction.py`.
"""

from __future__ import annotations

import io
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Final, Literal, TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger

from gateway.observe import recent
from gateway.observe.lines import HEAD, Record, listener, pipeline, rfc3339
from gateway.observe.redaction import (
    MAX_SECRETS,
    REDACTED,
    SHORT_SECRET,
    forget_secrets,
    redact,
    register_secret,
)
from gateway.observe.sinks import LEVELS, Level, Sink, Stream

__all__ = [
    "LEVELS", "MAX_SECRETS", "REDACTED", "SHORT_SECRET", "Format", "Level", "close", "configure", "forget_secrets",
    "get_logger", "listener", "pipeline", "redact", "register_secret", "reopen", "route", "set_level",
]  # fmt: skip

Format = Literal["json", "text", "auto"]


class _Route:
    """The sinks of a listener, a pipeline or the process."""

    __slots__ = ("only", "sinks", "threshold")

    def __init__(self, sinks: Iterable[Sink]) -> None:
        # Those that want the same form side by side: it is made once.
        self.sinks = tuple(sorted(sinks, key=lambda sink: sink.render.__name__))
        self.only = self.sinks[0] if len(self.sinks) == 1 else None  # nearly always
        self.threshold = min(sink.threshold for sink in self.sinks)

    def write(self, record: Record, level: int, now: float) -> None:
        """To each sink that wants this level."""
        line, form = b"", None
        for sink in self.sinks:
            if level >= sink.threshold:
                if sink.render is not form:
                    form = sink.render
                    line = form(record, now)
                sink.write(line, level, now)


class _Routes:
    """All sinks of the process."""

    def __init__(self) -> None:
        self.process = _Route([Stream()])
        self.pipelines: dict[str, _Route] = {}
        self.listeners: dict[tuple[str, str], _Route] = {}
        self.split = False
        self.configured: dict[Sink, int] = {}

    def sinks(self) -> list[Sink]:
        """Each once."""
        routes = (self.process, *self.pipelines.values(), *self.listeners.values())
        return list(dict.fromkeys(sink for route in routes for sink in route.sinks))

    def replace(
        self,
        process: Sequence[Sink],
        pipelines: Mapping[str, Sequence[Sink]],
        listeners: Mapping[tuple[str, str], Sequence[Sink]],
    ) -> None:
        """Use these from now on; the old ones are closed."""
        old = self.sinks()
        self.process = _Route(process)
        self.pipelines = {name: _Route(sinks) for name, sinks in pipelines.items()}
        self.listeners = {name: _Route(sinks) for name, sinks in listeners.items()}
        self.split = bool(pipelines or listeners)
        kept = self.sinks()
        for sink in old:
            if sink not in kept:
                sink.close()
        self.configured = {sink: sink.threshold for sink in kept}

    def set_level(self, level: Level | None) -> None:
        """Of every sink."""
        for sink, threshold in self.configured.items():
            sink.threshold = threshold if level is None else LEVELS[level]
        for route in (self.process, *self.pipelines.values(), *self.listeners.values()):
            route.threshold = min(sink.threshold for sink in route.sinks)

    def find(self, name: str) -> _Route:
        """Where the records of this pipeline go, from here."""
        own = self.listeners.get((name, listener.get())) if self.listeners else None
        return own or self.pipelines.get(name) or self.process

    def write(self, logger: _Named, method: str, event: MutableMapping[str, object]) -> bytes:
        """The one structlog processor: from a record's keys to its lines, written. Nothing is left for the logger."""
        level = LEVELS[method]
        if "pipeline" not in event:
            event["pipeline"] = pipeline.get() or None
        route = self.find(str(event["pipeline"] or "")) if self.split else self.process
        if level < route.threshold:
            raise structlog.DropEvent
        now = time.time()
        record: Record = {
            "time": rfc3339(now),
            "level": "error" if method == "exception" else method,
            "logger": logger.name,
            "record": event.pop("event"),
        }
        if "exc_info" in event and (caught := event.pop("exc_info")):
            event["exception"] = _traceback(caught)
        for key, value in event.items():
            if value is None:
                continue
            if type(value) is bytes:
                value = value.decode("utf-8", "backslashreplace")
            if key in HEAD:
                key = f"{key}_"
            record[key] = value
        recent.records.append(record)
        if (only := route.only) is not None:
            only.write(only.render(record, now), level, now)
        else:
            route.write(record, level, now)
        return b""


class _Named:
    """A logger's name, and the methods that structlog calls at the end."""

    __slots__ = ("name",)

    def __init__(self, name: str = "gateway") -> None:
        self.name = name

    def done(self, line: bytes) -> None:
        """It is written already."""

    debug = info = warning = error = critical = exception = done


def _traceback(exc_info: object) -> str:
    error = exc_info if isinstance(exc_info, BaseException) else sys.exc_info()[1]
    return "".join(traceback.format_exception(error)).rstrip() if error is not None else ""


_routes = _Routes()
_PROCESSORS: Final = [_routes.write]


# -- set-up ----------------------------------------------------------------------------------------------------


def configure(
    format: Format = "auto",
    level: Level = "info",
    *,
    file: str | None = None,
    stream: TextIO | io.BufferedIOBase | None = None,
) -> None:
    """Log to one sink: to `file`, else to `stream` (which must have a descriptor), else to standard error.

    `auto` is text on a terminal and JSON elsewhere. May be called again; loggers got earlier follow. Raises OSError
    if the file cannot be opened; the log then stays what it was.
    """
    descriptor = (stream or sys.__stderr__ or sys.stderr).fileno() if file is None else -1
    if format == "auto":
        format = "text" if file is None and os.isatty(descriptor) else "json"
    route([Stream(format, level, file=file, descriptor=descriptor)])


def route(
    process: Sequence[Sink],
    pipelines: Mapping[str, Sequence[Sink]] | None = None,
    listeners: Mapping[tuple[str, str], Sequence[Sink]] | None = None,
) -> None:
    """Log to these sinks: of listeners (by names of pipeline and listener), of pipelines, and of all others.

    What goes to a listener's sinks does not go to the pipeline's, and what goes to a pipeline's not to the process's.
    Each has at least one. Sinks that were in use and are not among these are closed.
    """
    _routes.replace(process, pipelines or {}, listeners or {})
    structlog.configure(
        processors=_PROCESSORS,
        wrapper_class=structlog.make_filtering_bound_logger(0),
        logger_factory=_Named,
        cache_logger_on_first_use=True,
    )


def set_level(level: Level | None) -> None:
    """Log records of `level` and above to every sink, until `route` is called; None: what was configured."""
    _routes.set_level(level)


def reopen() -> None:
    """Open all log files again, after they were moved away (logrotate).

    Raises the first OSError after all were tried; the files that cannot be opened stay what they were.
    """
    errors = []
    for sink in _routes.sinks():
        try:
            sink.reopen()
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def close() -> None:
    """At the end of the process: sinks say what they lost and are closed; what comes now goes to standard error."""
    configure("json")


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger; its name is in every record. It may be got before `configure`, which it then follows."""
    return cast("FilteringBoundLogger", structlog.get_logger(name))
