"""Logs of the service: the sinks that the files ask for, the secrets that no sink shows, the first warnings."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.config.load import Loaded
from gateway.config.log_settings import LogSinks
from gateway.observe import logs
from gateway.observe.sinks import Sink
from gateway.pipeline.plan import Plan
from gateway.service.listening import StartError


def set_up(compiled: Sequence[Plan], loaded: Loaded) -> None:
    """Open every sink. Raises StartError where one cannot be opened."""
    for _, document in loaded.pipelines:
        for secret in document.secrets:
            logs.register_secret(secret)
    process = _of_process(loaded)
    pipelines: dict[str, list[Sink]] = {}
    listeners: dict[tuple[str, str], list[Sink]] = {}
    for pipeline, _ in loaded.pipelines:
        if _says_where(pipeline.log) and _sinks(pipeline.log) != _sinks(process):
            pipelines[pipeline.name] = _open(pipeline.log)
        for listener in pipeline.listen:
            if listener.log is not None:
                opened = _open(listener.log)
                names = [listener.name] if listener.name else map(str, listener.url.urls())
                listeners.update({(pipeline.name, name): opened for name in names})
    logs.route(_open(process), pipelines, listeners)
    _warn(compiled)


def _of_process(loaded: Loaded) -> LogSinks:
    """What `process.log` says; where that is not written, the log that all pipelines agree on."""
    process, logs = loaded.process, [pipeline.log for pipeline, _ in loaded.pipelines]
    if "log" in process.model_fields_set or any(_sinks(log) != _sinks(logs[0]) for log in logs):
        return process.log
    return logs[0]


def _says_where(log: LogSinks) -> bool:
    """Whether it is a log of its own; `debug_clients` alone make none."""
    return not log.model_fields_set.isdisjoint(("format", "level", "file", "sinks"))


def _sinks(log: LogSinks) -> tuple[object, ...]:
    return log.format, log.level, log.file, log.sinks


def _open(log: LogSinks) -> list[Sink]:
    try:
        return log.open()
    except OSError as error:
        what = error.filename or log.file
        kind = "syslog" if str(what).startswith("udp:") else "log file"
        raise StartError(f"{kind} {what}: {error.strerror or error}") from None


def _warn(compiled: Sequence[Plan]) -> None:
    """What `gateway check` warns of stands in the log too: not everybody checks first."""
    log = logs.get_logger("gateway.run")
    for plan in compiled:
        for text in plan.warnings:
            log.warning("warning", pipeline=plan.name, text=text)
