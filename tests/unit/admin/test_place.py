"""Where the admin API listens."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from gateway.admin.place import bound, default_socket


@pytest.mark.parametrize(
    ("environment", "uid", "path"),
    [
        ({"RUNTIME_DIRECTORY": "/run/mail:/run/other"}, 0, "/run/mail/admin.sock"),
        ({}, 0, "/run/gateway/admin.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 7, "/run/user/7/gateway/admin.sock"),
        ({}, 7, "/tmp/gateway-7/admin.sock"),
    ],
)
def test_default(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], uid: int, path: str) -> None:
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getuid", lambda: uid)
    assert default_socket() == Path(path)


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_modes(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "run" / "admin.sock"
    mask = os.umask(0o002)
    try:
        with bound(f"unix:{path}", mode):
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
            assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700
            assert os.umask(0o002) == 0o002, "the umask is what it was"
    finally:
        os.umask(mask)


def test_a_socket_left_behind_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    bound(f"unix:{path}").close()
    with bound(f"unix:{path}"), pytest.raises(OSError, match="another process listens there"):
        bound(f"unix:{path}")
    path.unlink()
    path.write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        bound(f"unix:{path}")
    assert path.read_text() == "precious"


def test_tcp() -> None:
    with bound("127.0.0.1:0") as sock, socket.create_connection(sock.getsockname()):
        pass
