"""What the content rows need beside the other peers: the filter in C, Postfix that asks it, a stage that only reads.

The stage is `bench_read`; `reading_stage` makes a folder that declares it as an installed package would.
"""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

from bench.peers import Process, cpu_of, cpu_of_the_dead
from gateway import Message, Refuse, Session, Settings, Stage
from tests.peers.postfix import Postfix

SOURCE = Path(__file__).with_name("filter.c")


class Read(Stage):
    """Read the whole message, block by block, and say nothing."""

    Settings = Settings

    async def message(self, session: Session, message: Message) -> Refuse | None:
        """Read to the end."""
        async for _ in message.blocks():
            pass
        return None


def reading_stage(folder: Path) -> dict[str, str]:
    """The environment in which the gateway knows `bench_read`."""
    path = folder / "declared"
    info = path / "bench_read-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-read\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[gateway.stages]\nbench_read = bench.filters:Read\n")
    return {"PYTHONPATH": f"{path}:{Path(__file__).parents[1]}"}


def start_filter(folder: Path, mode: str) -> tuple[Process, str]:
    """Compile filter.c if that was not done yet, and start it: (process, its socket as an MTA names it)."""
    program, path = folder / "filter", folder / f"filter-{mode}.sock"
    if not program.exists():
        subprocess.run(["cc", "-O2", "-o", str(program), str(SOURCE), "-lmilter", "-lpthread"], check=True)

    def listens() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
        return True

    # libmilter looks at SIGTERM every few seconds only.
    process = Process([str(program), f"unix:{path}", mode], folder / f"filter-{mode}.log", ends_by=signal.SIGKILL)
    process.until(listens)
    return process, f"unix:{path}"


class PostfixPeer:
    """Postfix that asks the filter before its queue and relays everything to the sink; all of its processes count.

    Its processes live as long as the run, which is in its favor; everything else is as it comes.
    """

    def __init__(self, folder: Path, milter: str, sink: int) -> None:
        self._folder = folder / "postfix"
        self._folder.mkdir()
        self._folder.chmod(0o755)
        main = f"""\
smtpd_milters = {milter}
relayhost = [127.0.0.1]:{sink}
max_use = 1000000
message_size_limit = 100000000
"""
        self._postfix = Postfix(self._folder, main=main).start()
        self.port = self._postfix.port

    def cpu_by_program(self) -> dict[str, float]:
        """CPU seconds so far, of processes that have ended under `ended`."""
        master = self._postfix.pid
        children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
        seconds = {"ended": cpu_of_the_dead(master)}
        for pid in (master, *map(int, children)):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            seconds[name] = seconds.get(name, 0.0) + cpu_of(pid)
        return seconds

    def cpu(self) -> float:
        """CPU seconds of all processes so far."""
        return sum(self.cpu_by_program().values())

    def queued(self) -> int:
        """Messages that are not delivered yet."""
        queues = (self._folder / "spool" / name for name in ("incoming", "active", "deferred"))
        return sum(1 for queue in queues for path in queue.rglob("*") if path.is_file())

    def stop(self) -> None:
        """End it by its id."""
        self._postfix.stop()
