"""`gateway run FILE|DIR...`: serve until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import signal
import sys

import click

from gateway.cli.loading import fail, plans


@click.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--loop", "loop_name", type=click.Choice(["auto", "uvloop", "asyncio"]), default="auto",
              help="Event loop; auto takes uvloop where it is installed.")
def command(paths: tuple[str, ...], loop_name: str) -> None:
    """Serve the pipelines of these files and folders."""
    compiled, loaded = plans(paths)
    process = loaded.process
    from gateway.observe.logs import configure
    from gateway.service.worker import StartError, Worker

    configure(process.log.format, process.log.level, process.log.file)
    worker = Worker(compiled, process.state_directory)
    try:
        with asyncio.Runner(loop_factory=_loop_factory(loop_name)) as runner:
            runner.run(_serve(worker, process.drain))
    except StartError as error:
        fail(f"gateway: {error}")


def _loop_factory(name: str) -> object:
    if name == "asyncio":
        return asyncio.new_event_loop
    try:
        import uvloop
    except ImportError:
        if name == "uvloop":
            fail("gateway: uvloop is not installed")
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _serve(worker: object, grace: float) -> None:
    from gateway.service.worker import Worker

    assert isinstance(worker, Worker)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await worker.open()
    print("gateway: ready", file=sys.stderr, flush=True)
    await stopped.wait()
    await worker.close(grace)
