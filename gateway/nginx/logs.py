"""`error_log` as the sinks of a pipeline's log."""

from __future__ import annotations

import re
from pathlib import Path

from gateway.nginx.conf import Directive
from gateway.nginx.merge import Server
from gateway.nginx.write import Map

LEVELS = {
    "debug": "debug", "info": "info", "notice": "notice", "warn": "warning", "error": "error", "crit": "critical",
    "alert": "critical", "emerg": "critical",
}  # fmt: skip


def log(server: Server, prefix: Path) -> Map | None:
    """The `log` mapping, with a sink for each `error_log`; None without any. Relative files are below `prefix`."""
    sinks = [sink for directive in server.written("error_log") if (sink := _sink(server, directive, prefix))]
    return Map().put("format", "text").put("sinks", sinks) if sinks else None


def _sink(server: Server, directive: Directive, prefix: Path) -> Map | None:
    where, *levels = directive.arguments
    level = "debug" if any(word.startswith("debug") for word in levels) else LEVELS[levels[-1]] if levels else "error"
    sink = Map()
    if where == "stderr":
        sink.put("to", "stderr", str(directive))
    elif where.startswith("syslog:"):
        sink.put("to", "syslog", str(directive))
        if not _syslog(server, directive, where.removeprefix("syslog:"), sink):
            return None
    elif where.startswith("memory:"):
        text = "error_log: there is no log in memory; name a file, stderr or syslog:server=... instead"
        server.findings.unequal(directive, text)
        return None
    else:
        sink.put("to", "file", str(directive)).put("path", str(prefix / where))
    return sink.put("level", level)


def _syslog(server: Server, directive: Directive, text: str, sink: Map) -> bool:
    """server=, facility=, tag=, nohostname; severity= would only change the number in the message."""
    words = dict(word.partition("=")[::2] for word in text.split(","))
    address = words.pop("server", "")
    if not address:
        server.findings.fatal(directive, '"error_log" directive: no syslog server specified')
        return False
    if address.startswith("unix:"):
        sink.put("address", address)
    else:
        bare = address.count(":") > 1 and not address.startswith("[")
        host = f"[{address}]" if bare else address
        sink.put("address", f"udp://{host}" if re.search(r"[^:\]]:\d+$|\]:\d+$", host) else f"udp://{host}:514")
    sink.put("facility", words.pop("facility", "local7"))
    sink.put("tag", words.pop("tag", "nginx"))
    if words.pop("nohostname", None) is not None:
        sink.put("hostname", "off")
    if words.pop("severity", None) is not None:
        server.findings.warning(directive, "error_log: severity= is not kept, each record has its level's")
    for name in words:
        server.findings.fatal(directive, f'"error_log" directive: unknown syslog parameter "{name}"')
    return True
