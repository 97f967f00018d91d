"""Directives that came after the nginx of the differential test: what the gateway does with them, imported."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

import pytest

from tests.interop.nginx_legs import imported_gateway
from tests.peers.process import free_port, scratch
from tests.peers.recording_auth_server import Answer, RecordingAuthServer
from tests.peers.recording_auth_server import Client as Asking
from tests.peers.recording_upstream import RecordingUpstream

pytestmark = [pytest.mark.peers, pytest.mark.slow]

CONFIGURATION = """\
mail {
    server_name mx.test;
    auth_http 127.0.0.1:%d/auth;
    xclient off;
    proxy_protocol v2;
    server { listen 127.0.0.1:%d; protocol %s; }
}
"""
LOGINS = {
    "smtp": b"AUTH PLAIN AGpvZQBzZWNyZXQ=\r\n",
    "imap": b"t LOGIN joe secret\r\n",
    "pop3": b"AUTH PLAIN AGpvZQBzZWNyZXQ=\r\n",
}
WORDS = {"smtp": b"HELO mx.test\r\n", "imap": b"t LOGIN ", "pop3": b"USER joe\r\n"}
WELCOME = {"smtp": b"235 ", "imap": b"t OK ", "pop3": b"+OK logged in"}
SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


@pytest.mark.parametrize("protocol", LOGINS)
def test_proxy_header_of_version_2_to_the_upstream(protocol: str) -> None:
    """nginx 1.31.4 and later: binary, TCP over IPv4, the client and the server's own address."""
    port = free_port()
    with scratch() as folder:
        own, header, rest = asyncio.run(_log_in(folder, protocol, port))
    loopback = socket.inet_aton("127.0.0.1")
    assert header == SIGNATURE + b"\x21\x11\x00\x0c" + loopback * 2 + struct.pack("!HH", own, port)
    assert rest.startswith(WORDS[protocol])


async def _log_in(folder: Path, protocol: str, port: int) -> tuple[int, bytes, bytes]:
    """The client's port, the PROXY header that the upstream was sent, and what followed it."""
    async with RecordingAuthServer() as auth, RecordingUpstream(protocol) as upstream:
        text = f"Auth-Status: OK\r\nAuth-Server: 127.0.0.1\r\nAuth-Port: {upstream.port}\r\n\r\n"
        auth.default = Asking([Answer(b"HTTP/1.0 200 OK\r\n" + text.encode())])
        configuration = folder / "nginx.conf"
        configuration.write_text(CONFIGURATION % (auth.port, port, protocol))
        program = imported_gateway(folder, configuration)
        await asyncio.to_thread(program.start)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            own = int(writer.get_extra_info("sockname")[1])
            await reader.readline()
            writer.write(LOGINS[protocol])
            assert (await reader.readline()).startswith(WELCOME[protocol])
            writer.close()
            await upstream.settled()
        finally:
            await asyncio.to_thread(program.stop)
    (received,) = upstream.received
    return own, bytes(received[:28]), bytes(received[28:])
