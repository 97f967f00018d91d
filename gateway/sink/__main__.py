"""`python -m gateway.sink`: the embedded upstream as a program.

It listens on a unix socket (mode 0600) or a loopback address, since it believes whoever connects. With `--ready-fd`
it writes one line to that descriptor, `listening ADDRESS` or `failed REASON`, and ends when the other side of it is
closed: so it never outlives the process that started it. The socket's folder is then removed as well if it is empty.
It also ends on SIGTERM and SIGINT.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import signal
import sys
from pathlib import Path

from gateway.service import privileges
from gateway.sink.maildir import Maildir
from gateway.sink.server import server_factory


def listen_address(text: str) -> str | tuple[str, int]:
    """`unix:/path` as a path, `127.0.0.1:2525` or `[::1]:2525` as host and port. Raises ValueError."""
    if text.startswith("unix:"):
        return text.removeprefix("unix:")
    match = re.fullmatch(r"\[?([0-9a-fA-F.:]+?)\]?:(\d{1,5})", text)
    if match is None or not ipaddress.ip_address(match[1]).is_loopback:
        raise ValueError(f"{text!r} is neither unix:/path nor a loopback address with its port")
    return match[1], int(match[2])


async def serve(maildir: Path, listen: str | tuple[str, int], hostname: str, ready_fd: int | None) -> None:
    """Serve until a signal, or until the other side of `ready_fd` is closed. Raises OSError."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    factory = server_factory(Maildir(maildir), hostname)
    if isinstance(listen, str):
        server = await loop.create_unix_server(factory, listen)
        address = f"unix:{listen}"
    else:
        server = await loop.create_server(factory, *listen)
        host, port = server.sockets[0].getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if ready_fd is not None:
        os.write(ready_fd, f"listening {address}\n".encode())
        loop.add_reader(ready_fd, ended.set)  # nothing is ever sent to us: readable means closed
    await ended.wait()
    if ready_fd is not None:
        loop.remove_reader(ready_fd)
    server.close()


def main() -> int:
    """Exit status 0 after a signal or the parent's end, 1 if it cannot serve, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m gateway.sink", description="A mail server that stores a Maildir.")
    parser.add_argument("--maildir", type=Path, required=True, help="folder, made if missing")
    parser.add_argument("--listen", type=listen_address, required=True, help="unix:/path or 127.0.0.1:PORT")
    parser.add_argument("--hostname", default="sink.localhost", help="name in its replies")
    parser.add_argument("--ready-fd", type=int, help="descriptor for the ready line; its closing ends the server")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, format="gateway.sink: %(message)s", level=logging.ERROR)
    os.umask(0o077)
    if not privileges.is_root():
        privileges.drop(None)  # as everything that reads mail
    try:
        asyncio.run(serve(options.maildir, options.listen, options.hostname, options.ready_fd))
    except OSError as error:
        print(f"gateway.sink: {error}", file=sys.stderr, flush=True)
        if options.ready_fd is not None:
            os.write(options.ready_fd, f"failed {error}\n".encode())
        return 1
    if isinstance(options.listen, str):
        Path(options.listen).unlink(missing_ok=True)
        if options.ready_fd is not None:  # who started us may be gone, and made the socket's folder for us alone
            with contextlib.suppress(OSError):
                os.rmdir(Path(options.listen).parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
