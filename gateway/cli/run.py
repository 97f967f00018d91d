"""`gateway run FILE|DIR...`: serve until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gateway.cli.loading import fail, plans
from gateway.cli.logging_setup import set_up
from gateway.cli.pid_file import PidFile

if TYPE_CHECKING:
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
@click.option(
    "--pid-file",
    type=click.Path(path_type=Path),
    help="Write the process's id there once it serves; removed when it ends.",
)
def command(paths: tuple[str, ...], loop_name: str, pid_file: Path | None) -> None:
    """Serve the pipelines of these files and folders."""
    compiled, loaded = plans(paths)
    process = loaded.process
    from gateway.observe import logs
    from gateway.service.heap import keep_heap
    from gateway.service.listening import StartError
    from gateway.service.worker import Worker

    set_up(compiled, loaded)
    keep_heap()
    worker = Worker(compiled, process.state_directory)
    try:
        with contextlib.ExitStack() as stack:
            published = _pid_file(stack, pid_file)
            runner = stack.enter_context(asyncio.Runner(loop_factory=_loop_factory(loop_name)))
            runner.run(_serve(worker, process.drain, published))
    except StartError as error:
        fail(f"gateway: {error}")
    finally:
        logs.close()


def _pid_file(stack: contextlib.ExitStack, path: Path | None) -> Callable[[], None]:
    """What is to be called once the process serves."""
    if path is None:
        return lambda: None
    try:
        return stack.enter_context(PidFile(path)).publish
    except OSError as error:
        fail(f"gateway: pid file {path}: {error.strerror or error}")


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


async def _serve(worker: Worker, grace: float, ready: Callable[[], None]) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    loop.add_signal_handler(signal.SIGHUP, _no_reload)
    await worker.open()
    ready()
    print("gateway: ready", file=sys.stderr, flush=True)
    await stopped.wait()
    await worker.close(grace)
