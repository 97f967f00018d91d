"""`log`: of the process, of a pipeline, of a listener; and the sinks that it stands for."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from gateway.config.base import Findings, Model
from gateway.observe.sinks import Sink, Stream
from gateway.observe.syslog import FACILITIES, Syslog, parse_address
from gateway.values import KIND, CidrList, NotA, PathValue, shown

_OTHER_NAMES = {"warn": "warning", "err": "error", "crit": "critical", "alert": "critical", "emerg": "critical"}


def _level(value: object) -> object:
    """The names of nginx and syslog too."""
    return _OTHER_NAMES.get(value, value) if isinstance(value, str) else value


Level = Annotated[Literal["debug", "info", "notice", "warning", "error", "critical"], BeforeValidator(_level)]
Format = Literal["json", "text"]


def _syslog_address(value: object) -> str:
    try:
        parse_address(str(value))
    except ValueError as error:
        raise NotA("a syslog address", "udp://127.0.0.1:514 or unix:/dev/log", str(error)) from None
    return str(value)


def _facility(value: object) -> str:
    if value not in FACILITIES:
        raise NotA("a facility", "mail, daemon, local0 or another of syslog's", f"{shown(value)} is not a facility")
    return str(value)


def _no_hostname(value: object) -> object:
    return "" if value in (False, "off") else value


SyslogAddress = Annotated[
    str,
    PlainValidator(_syslog_address),
    WithJsonSchema({"type": "string", "pattern": "^(udp://|unix:/)", KIND: "syslog address"}),
]
Facility = Annotated[str, PlainValidator(_facility), WithJsonSchema({"enum": list(FACILITIES), KIND: "facility"})]


class LogSink(Model):
    """A place that records go to."""

    to: Literal["stderr", "file", "syslog"] = Field(description="What it is.")
    level: Level | None = Field(None, description="Records below it are left out; as `log.level` says by default.")
    format: Format | None = Field(
        None, description="For stderr and file: as `log.format` says by default. Syslog always gets text."
    )
    path: PathValue | None = Field(None, description="For file: it is opened to append.")
    address: SyslogAddress | None = Field(None, description="For syslog: udp://host:port (514) or unix:/dev/log.")
    facility: Facility = Field("mail", description="For syslog.")
    tag: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,32}$")] = Field("gateway", description="For syslog.")
    hostname: Annotated[str, BeforeValidator(_no_hostname), Field(pattern=r"^[!-~]{0,255}$")] | None = Field(
        None,
        description="For syslog: the name in each message, or off. By default the machine's, and none to unix:, as "
        "local daemons expect it.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Each kind has its own settings; one that would do nothing is an error."""
        findings = Findings()
        own = {"stderr": {"format"}, "file": {"format", "path"}, "syslog": {"address", "facility", "tag", "hostname"}}
        for key in sorted(self.model_fields_set - own[self.to] - {"to", "level"}):
            findings.add((key,), None, f"a sink to {self.to} has no {key}", "remove it")
        if self.to == "file" and self.path is None:
            findings.add(("to",), None, "a file without its path", "add `path: /var/log/gateway.log`")
        if self.to == "syslog" and self.address is None:
            findings.add(("to",), None, "syslog without its address", "add `address: unix:/dev/log`")
        findings.report(self)
        return self


class LogSinks(Model):
    """Where and how it is logged. Without `sinks` there is one: `file`, or standard error."""

    format: Format = Field("json", description="One JSON object a line, or text for people.")
    level: Level = Field(
        "info",
        description="Records below it are left out. No record is a notice; crit, alert and emerg are critical.",
    )
    file: PathValue | None = Field(None, description="Standard error by default.")
    sinks: tuple[LogSink, ...] = Field(
        (), description="Places that records go to, instead of one: standard error, files, syslog."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        findings = Findings()
        if "sinks" in self.model_fields_set and not self.sinks:
            findings.add(("sinks",), None, "no sinks", "name one or remove the key; `level: critical` is nearly silent")
        elif self.sinks and self.file is not None:
            findings.add(("file",), None, "`file` beside `sinks`", "write it as `- {to: file, path: ...}`")
        findings.report(self)
        return self

    def open(self) -> list[Sink]:
        """The sinks, open. Raises OSError, with the file or address as its `filename`."""
        if not self.sinks:
            return [Stream(self.format, self.level, file=str(self.file) if self.file is not None else None)]
        opened: list[Sink] = []
        try:
            opened += (self._open(sink) for sink in self.sinks)
        except OSError:
            for sink in opened:
                sink.close()
            raise
        return opened

    def _open(self, sink: LogSink) -> Sink:
        level = sink.level or self.level
        if sink.address is None:
            return Stream(sink.format or self.format, level, file=str(sink.path) if sink.path is not None else None)
        try:
            return Syslog(sink.address, level, facility=sink.facility, tag=sink.tag, hostname=sink.hostname)
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), sink.address) from None


class Log(LogSinks):
    """Where and how the gateway logs. Without `sinks` there is one: `file`, or standard error."""

    debug_clients: CidrList = Field((), description="Clients whose conversation is logged, secrets removed.")
