"""`gateway run FILE|DIR...`: serve until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from gateway.cli.loading import fail, plans

if TYPE_CHECKING:
    from gateway.config.load import Loaded
    from gateway.config.models import Log
    from gateway.pipeline.compile import Plan
    from gateway.service.worker import Worker


@click.command()
@click.argument("paths", nargs=-1, required=True)
@click.option(
    "--loop",
    "loop_name",
    type=click.Choice(["auto", "uvloop", "asyncio"]),
    default="auto",
    help="Event loop; auto takes uvloop where it is installed.",
)
def command(paths: tuple[str, ...], loop_name: str) -> None:
    """Serve the pipelines of these files and folders."""
    compiled, loaded = plans(paths)
    process = loaded.process
    from gateway.observe.logs import configure, register_secret
    from gateway.service.worker import StartError, Worker

    log = _one_log(loaded)
    for _, document in loaded.pipelines:
        for secret in document.secrets:
            register_secret(secret)
    try:
        configure(log.format, log.level, file=str(log.file) if log.file is not None else None)
    except OSError as error:
        fail(f"gateway: log file {log.file}: {error.strerror or error}")
    _debug_clients(compiled, loaded)
    _warn(compiled)
    worker = Worker(compiled, process.state_directory)
    try:
        with asyncio.Runner(loop_factory=_loop_factory(loop_name)) as runner:
            runner.run(_serve(worker, process.drain))
    except StartError as error:
        fail(f"gateway: {error}")


def _one_log(loaded: Loaded) -> Log:
    """A process writes one log: the process's, or the one its pipelines agree on."""
    if "log" in loaded.process.model_fields_set:
        return loaded.process.log
    wanted = {(one.log.format, one.log.level, one.log.file): one.log for one, _ in loaded.pipelines}
    if len(wanted) > 1:
        fail("gateway: the pipelines want different logs, but one process writes one; write it below process.log")
    return next(iter(wanted.values()))


def _debug_clients(compiled: list[Plan], loaded: Loaded) -> None:
    """Those of `process.log` hold for pipelines that have no `log` of their own."""
    from gateway.frontend.served import Networks

    for plan, (pipeline, _) in zip(compiled, loaded.pipelines, strict=True):
        if "log" not in pipeline.model_fields_set:
            plan.debug_clients = Networks(loaded.process.log.debug_clients)


def _warn(compiled: list[Plan]) -> None:
    """What `gateway check` warns of stands in the log too: not everybody checks first."""
    import structlog

    log = structlog.get_logger("gateway.run")
    for plan in compiled:
        for text in plan.warnings:
            log.warning("warning", pipeline=plan.name, text=text)


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    try:
        import uvloop
    except ImportError:
        if name == "uvloop":
            fail("gateway: uvloop is not installed")
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _no_reload() -> None:
    """SIGHUP would end the process in the middle of messages, and who sends it wants the opposite."""
    import structlog

    text = "SIGHUP: files are not read again while the gateway runs; stop it (SIGTERM) and start it"
    structlog.get_logger("gateway.run").warning("warning", text=text)


async def _serve(worker: Worker, grace: float) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    loop.add_signal_handler(signal.SIGHUP, _no_reload)
    await worker.open()
    print("gateway: ready", file=sys.stderr, flush=True)
    await stopped.wait()
    await worker.close(grace)
