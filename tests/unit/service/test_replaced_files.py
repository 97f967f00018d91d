"""What root does to files in folders that the gateway's account may write to, where it puts links in their place."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.admin import place
from gateway.cli.pid_file import PidFile
from gateway.pipeline.plan import ListenerPlan
from gateway.service import listening, privileges
from gateway.service.control_sockets import Access, ControlSockets
from gateway.service.listening import StartError
from gateway.sink.process import EmbeddedServer
from tests.peers.require import require_root

NOBODY = (65534, 65534)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder that must stay root's, with a file that only its owner may read."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "secret").write_text("secret")
    (folder / "secret").chmod(0o600)
    return folder


class Replaced(EmbeddedServer):
    """Its folder becomes a link right after somebody looked whose it is."""

    victim: Path

    def _is_ours(self) -> bool:
        ours = super()._is_ours()
        if ours:
            os.rename(self._folder, f"{self._folder}.away")
            os.symlink(self.victim, self._folder)
        return ours


def test_the_folder_of_an_embedded_server_that_comes_back(tmp_path: Path, victim: Path) -> None:
    require_root()
    server = Replaced(account=(*NOBODY, ()))
    server.victim = victim
    server._make_folder()
    try:
        with pytest.raises(OSError):
            server.start(tmp_path / "mail", timeout=1)
        assert victim.stat().st_uid == 0
    finally:
        os.unlink(server._folder)
        shutil.rmtree(f"{server._folder}.away")


def test_a_new_maildir(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_root()
    make = Path.mkdir

    def mkdir(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        make(path, mode, parents, exist_ok)
        path.rmdir()
        path.symlink_to(victim)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    server = EmbeddedServer(account=(*NOBODY, ()))
    with pytest.raises(OSError):
        server.start(tmp_path / "mail", timeout=1)
    assert victim.stat().st_uid == 0


def unix_plan(path: Path) -> ListenerPlan:
    """A listener on a unix socket."""
    return ListenerPlan(
        url=f"smtp+unix:{path}", name="", host="", port=0, path=str(path), implicit_tls=False, proxy_protocol=False
    )


@pytest.mark.parametrize("how", ["symlink", "link"])
def test_a_unix_listener(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    class Socket(socket.socket):
        def bind(self, address: str) -> None:  # type: ignore[override]
            super().bind(address)
            os.unlink(address)
            getattr(os, how)(victim / "secret", address)

    monkeypatch.setattr(socket, "socket", Socket)
    with pytest.raises(StartError, match="in the socket's place"):
        listening.bound(unix_plan(tmp_path / "smtp.sock"))
    assert (victim / "secret").stat().st_mode & 0o777 == 0o600


def test_a_pid_file(tmp_path: Path, victim: Path) -> None:
    (tmp_path / f".gateway.pid.{os.getpid()}").symlink_to(victim / "secret")
    with PidFile(tmp_path / "gateway.pid") as file:
        file.publish()
        assert (tmp_path / "gateway.pid").read_text() == f"{os.getpid()}\n"
    assert (victim / "secret").read_text() == "secret"


def test_a_control_socket_that_cannot_be_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without CAP_CHOWN: nothing of it is kept, so that the service goes on without it."""
    require_root()

    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "chown", refused)
    control, path = ControlSockets(), tmp_path / "admin.sock"
    wanted = {f"unix:{path}": Access(0o600, NOBODY)}
    with pytest.raises(PermissionError):
        control.get(f"unix:{path}", wanted[f"unix:{path}"])
    control.keep(wanted)
    assert not path.exists()


def test_the_mode_of_a_socket_that_is_the_accounts(tmp_path: Path) -> None:
    """It changes without CAP_FOWNER, too, which the unit does not give."""
    require_root()
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv(1)")
    program = (
        "import sys; from gateway.service.control_sockets import *; c = ControlSockets(); u = 'unix:' + sys.argv[1];"
        "c.get(u, Access(0o600, (65534, 65534))); c.keep({u: Access(0o660, (65534, 65534))});"
        "import os; print(oct(os.stat(sys.argv[1]).st_mode & 0o777), os.stat(sys.argv[1]).st_uid)"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set=-fowner", "--inh-caps=-fowner", sys.executable, "-c", program,
         str(tmp_path / "admin.sock")], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "0o660 65534\n", done.stderr


def test_nobody_is_waited_for_who_does_not_accept(tmp_path: Path) -> None:
    """At the place of a control socket: connect(2) waits for room in a backlog that is full."""
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
        other.bind(str(path))
        other.listen(0)
        client.connect(str(path))
        program = "import sys; from gateway.admin import place; place.bound('unix:' + sys.argv[1])"
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60, check=False
        )
    assert "another process listens there" in done.stderr and path.exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
    with place.bound(f"unix:{path}") as sock:
        privileges.socket_file(str(path), mode=0o640)
        assert path.stat().st_mode & 0o777 == 0o640 and sock.getsockname() == str(path)
