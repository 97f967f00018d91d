"""`gateway run FILE|DIR...`: serve until SIGTERM; SIGHUP reads the files again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gateway.cli.loading import fail
from gateway.cli.pid_file import PidFile

if TYPE_CHECKING:
    from gateway.service.worker import Worker


@click.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--workers", help="Worker processes, 1 to 64, or auto: one a processor; default: process.workers.")
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
@click.option(
    "--no-supervisor",
    is_flag=True,
    help="Serve from this one process, for debugging: no reload, no admin API, no change of user.",
)
def command(
    paths: tuple[str, ...], workers: str | None, loop_name: str, pid_file: Path | None, no_supervisor: bool
) -> None:
    """Serve the pipelines of these files and folders."""
    if workers is not None:
        _check_workers(workers)
    with contextlib.ExitStack() as stack:
        ready = _pid_file(stack, pid_file)
        status = _alone(paths, loop_name, ready) if no_supervisor else _supervised(paths, workers, loop_name, ready)
    raise SystemExit(status)


def _supervised(paths: tuple[str, ...], workers: str | None, loop_name: str, ready: Callable[[], None]) -> int:
    from gateway.observe import logs
    from gateway.service.supervisor import Supervisor
    from gateway.service.systemd import ActivationError

    logs.configure("auto")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it ends nobody who has just begun
    try:
        supervisor = Supervisor(paths, workers=workers, loop=loop_name, ready=ready)
    except ActivationError as error:
        fail(f"gateway: {error}")
    return asyncio.run(supervisor.run())


def _alone(paths: tuple[str, ...], loop_name: str, ready: Callable[[], None]) -> int:
    from gateway.cli.loading import plans
    from gateway.observe import logs
    from gateway.service.child import loop_factory
    from gateway.service.heap import keep_heap
    from gateway.service.listening import StartError
    from gateway.service.log_set_up import set_up
    from gateway.service.places import state_directory, store_settings, trace_settings
    from gateway.service.worker import Worker

    compiled, loaded = plans(paths)
    process = loaded.process
    keep_heap()
    try:
        set_up(compiled, loaded)
        state = state_directory(process) if process.state_directory or process.store else None
        store = store_settings(process, state or state_directory(process), "memory")
        worker = Worker(compiled, state, store=store, traces=trace_settings(process))
        with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
            runner.run(_serve(worker, process.drain, ready))
    except StartError as error:
        fail(f"gateway: {error}")
    finally:
        logs.close()
    return 0


def _check_workers(text: str) -> None:
    from pydantic import TypeAdapter, ValidationError

    from gateway.config.process import Workers

    try:
        TypeAdapter(Workers).validate_python(text)
    except ValidationError:
        fail(f"gateway: --workers {text}: not a number of workers; write a number from 1 to 64, or auto")


def _pid_file(stack: contextlib.ExitStack, path: Path | None) -> Callable[[], None]:
    """What is to be called once the process serves."""
    if path is None:
        return lambda: None
    try:
        return stack.enter_context(PidFile(path)).publish
    except OSError as error:
        fail(f"gateway: pid file {path}: {error.strerror or error}")


def _no_reload() -> None:
    """SIGHUP would end the process in the middle of messages, and who sends it wants the opposite."""
    import structlog

    text = "SIGHUP: without a supervisor files are not read again; stop it (SIGTERM) and start it"
    structlog.get_logger("gateway.run").warning("warning", text=text)


async def _serve(worker: Worker, grace: float, ready: Callable[[], None]) -> None:
    from gateway.service.child import reopen_logs

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopped.is_set():
            worker.hurry()
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, _no_reload)
    loop.add_signal_handler(signal.SIGUSR1, reopen_logs)
    await worker.open()
    ready()
    print("gateway: ready", file=sys.stderr, flush=True)
    await stopped.wait()
    await worker.close(grace)
