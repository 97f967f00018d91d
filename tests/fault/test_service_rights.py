"""Rights of a service that root started: the supervisor keeps them, nothing else has them, and all that needs them
works from the first start over reloads and crashes."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

import gateway
from gateway.service import privileges
from tests.fault.client import Client
from tests.fault.reachable import for_everybody
from tests.fault.service import GATEWAY, Service, children, service, write
from tests.peers.process import free_port, scratch
from tests.peers.require import require_root

HERE = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["here"])

NOBODY = "nobody"
REPOSITORY = Path(gateway.__file__).parents[1]
SINK = {"servers": ["embedded://mail"]}
WITNESS = '''
"""Writes down as whom it is imported, and as whom each of its hooks runs."""
import os
from gateway import Kind, Settings, Stage

def note(what):
    with open(os.environ["WITNESS"], "a") as file:
        file.write(f"{what} {os.getresuid()} {os.getresgid()} {os.getgroups()}\\n")

note("import")

class Witness(Stage):
    Settings = Settings
    kind = Kind.GUARD

    def __init__(self, *arguments, **settings):
        note("made")
        super().__init__(*arguments, **settings)

    async def start(self, worker):
        note("start")

    def connect(self, session):
        note("connect")
'''


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other accounts can enter."""
    with scratch("gateway-rights-") as path:
        yield path


@pytest.fixture(scope="module")
def python() -> list[str]:
    """This Python and its packages, as a command that every account may run."""
    return [*for_everybody(), sys.executable]


def privileged_port() -> int:
    """A free port that only root may bind."""
    for port in range(1023, 600, -1):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port below 1024 is free")


def issue(folder: Path) -> bytes:
    """A certificate and its key for root alone, put into place as renewals do it; the certificate."""
    issued = trustme.CA().issue_cert("gw.example.org")
    chain, key = folder / "gw.crt", folder / "gw.key"
    for path, data in ((key, issued.private_key_pem.bytes()), (chain, issued.cert_chain_pems[0].bytes())):
        draft = path.with_suffix(".new")
        draft.touch(mode=0o600)
        draft.write_bytes(data)
        draft.rename(path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and key.stat().st_uid == 0
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())


def status(pid: int) -> dict[str, str]:
    """proc(5) status."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value.strip() for name, _, value in lines}


def as_whom(pid: int) -> tuple[list[int], ...]:
    """Real, effective, saved and file system user and group ids, and groups."""
    found = status(pid)
    return tuple([int(word) for word in found[name].split()] for name in ("Uid", "Gid", "Groups"))


def no_rights(running: Service, uid: int, gid: int, groups: list[int]) -> None:
    """The supervisor is root; generations, their children and the embedded server are the account's for good."""
    assert as_whom(running.process.pid)[0] == [0] * 4
    (sink,) = children(running.process.pid, "gateway.sink")
    others = [sink, *running.generations(), *running.workers()]
    assert len(others) >= 5
    for pid in others:
        found = status(pid)
        assert as_whom(pid) == ([uid] * 4, [gid] * 4, groups), (pid, found)
        assert [int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0] * 4, (pid, found)
        assert found["NoNewPrivs"] == "1", (pid, found["Name"])


async def certificate(running: Service) -> bytes:
    """The one that a new client is shown; a message is sent under it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client: Client = await running.client()
    assert (await client.say("STARTTLS")).startswith("220")
    await client.start_tls(context)
    for line, code in (
        ("EHLO client.test", "250"), ("MAIL FROM:<a@example.org>", "250"), ("RCPT TO:<b@example.org>", "250"),
        ("DATA", "354"), ("text\r\n.", "250"), ("QUIT", "221"),
    ):  # fmt: skip
        assert (await client.say(line)).startswith(code), line
    shown = client.writer.get_extra_info("ssl_object").getpeercert(True)
    client.writer.close()
    assert isinstance(shown, bytes)
    return shown


@HERE
@pytest.mark.anyio
async def test_only_the_supervisor_is_root(folder: Path, python: list[str]) -> None:
    """A privileged port and a key of root's, from the start over a reload, a crash and a renewal."""
    nobody = privileges.resolve(NOBODY)
    account = (nobody.uid, nobody.gid, list(nobody.groups))
    port, told = privileged_port(), folder / "witness.txt"
    told.touch()
    os.chown(told, nobody.uid, nobody.gid)
    (folder / "witness.py").write_text(WITNESS)
    (folder / "witness-1.dist-info").mkdir()
    (folder / "witness-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: witness\nVersion: 1\n")
    (folder / "witness-1.dist-info" / "entry_points.txt").write_text("[gateway.stages]\nwitness = witness:Witness\n")
    shown = issue(folder)
    pipeline = {
        "listen": [f"smtp://127.0.0.1:{port}"],
        "tls": {"certificates": [{"chain": str(folder / "gw.crt"), "key": str(folder / "gw.key")}]},
        "stages": ["witness", "splice"],
        "upstreams": {"sink": SINK},
    }
    environment = {"PYTHONPATH": str(folder), "WITNESS": str(told)}
    async with service(
        folder, pipeline, command=[*python, "-m", "gateway"], environment=environment, workers=2, user=NOBODY
    ) as running:
        running.port = port
        no_rights(running, *account)
        assert await certificate(running) == shown
        admin = running.admin.stat()
        assert (admin.st_uid, stat.S_IMODE(admin.st_mode)) == (nobody.uid, 0o600)
        kept = [folder / "state", *(folder / "state").rglob("*"), folder / "mail", *(folder / "mail").rglob("*")]
        assert {path.stat().st_uid for path in kept} == {nobody.uid}, kept
        assert (folder / "state" / "store").exists()

        await running.reload()
        await running.record("generation_ended")
        no_rights(running, *account)
        assert await certificate(running) == shown

        workers = children(running.generations()[0])[:2]
        for number, pid in enumerate(workers):
            os.kill(pid, signal.SIGKILL)
            await running.record("worker_died", number + 1)
        assert await certificate(running) == shown
        assert not set(workers) & set(await running.whole())
        no_rights(running, *account)

        renewed = issue(folder)
        await running.record("certificate_renewed")
        assert await certificate(running) == renewed
        os.kill(children(running.generations()[0])[0], signal.SIGKILL)
        await running.record("worker_died", 3)
        assert await certificate(running) == renewed
        await running.reload()
        assert await certificate(running) == renewed
        assert len(list((folder / "mail" / "new").iterdir())) == 6
    hooks = [line.split(" ", 1) for line in told.read_text().splitlines()]
    assert {what for what, _ in hooks} == {"import", "made", "start", "connect"}
    expected = f"{(nobody.uid,) * 3} {(nobody.gid,) * 3} {list(nobody.groups)}"
    assert {who for _, who in hooks} == {expected}


@HERE
@pytest.mark.anyio
async def test_an_account_that_is_but_a_number(folder: Path, python: list[str]) -> None:
    pipeline = {"stages": ["splice"], "upstreams": {"sink": SINK}}
    async with service(
        folder, pipeline, command=[*python, "-m", "gateway"], workers=2, user=54321, group=54322
    ) as running:
        no_rights(running, 54321, 54322, [54322])
        client = await running.client()
        for line, code in (("MAIL FROM:<a@x.example>", "250"), ("RCPT TO:<b@x.example>", "250"), ("DATA", "354")):
            assert (await client.say(line)).startswith(code)
        assert (await client.say("text\r\n.")).startswith("250")
        (mail,) = (folder / "mail" / "new").iterdir()
        assert (mail.stat().st_uid, mail.stat().st_gid) == (54321, 54322)
        status, _ = await running.ctl("status")  # root may always
        assert status == 0


def refused(folder: Path, command: list[str], environment: dict[str, str], **process: object) -> str:
    """What the gateway says when it does not start."""
    pipeline = {"stages": ["splice"], "upstreams": {"sink": SINK}}
    path = write(folder, free_port(), pipeline, **process)
    ended = subprocess.run(
        [*command, "run", str(path)], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended
    return ended.stderr


@pytest.mark.parametrize(
    ("process", "said"),
    [
        ({"user": "root"}, "process.user: root would serve mail as root"),
        ({"user": NOBODY, "group": 0}, "process.group: nobody would be in the group root"),
    ],
)  # fmt: skip
def test_accounts_that_are_refused(folder: Path, process: dict[str, object], said: str) -> None:
    require_root()
    assert said in refused(folder, GATEWAY, {}, **process)
    assert not (folder / "state").exists() and not (folder / "mail").exists()


def test_an_installation_that_the_account_cannot_read(folder: Path, python: list[str]) -> None:
    """Found before anything is given away, and said with what to do."""
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    (closed / "gateway").symlink_to(REPOSITORY / "gateway")
    (closed / "stages").symlink_to(REPOSITORY / "stages")
    said = refused(folder, [*python, "-m", "gateway"], {"PYTHONPATH": str(closed)}, user=NOBODY)
    assert f"process.user: nobody cannot read {closed}, where the gateway is installed: install it where all" in said


def test_the_supervisor_imports_no_stage() -> None:
    program = (
        "import sys, gateway.cli.run, gateway.service.supervisor as supervisor\n"
        "supervisor.Supervisor(['pipeline.yaml'])\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'stages'])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert said.stdout == "[]\n"
