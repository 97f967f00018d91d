"""Who the service becomes, and that there is no way back."""

from __future__ import annotations

import grp
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.service import privileges
from gateway.service.privileges import (
    Identity,
    PrivilegeError,
    choose,
    chown_for,
    directory_for,
    replaceable,
    resolve,
    unreachable,
)

NOBODY = pwd.getpwnam("nobody")
ME = pwd.getpwuid(os.geteuid()).pw_name
OTHER = Identity("other", "others", 4242, 4343, (4343, 4444), "/home/other")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def test_resolve_by_name_and_number() -> None:
    by_name = resolve("nobody")
    assert (by_name.user, by_name.uid, by_name.gid) == ("nobody", NOBODY.pw_uid, NOBODY.pw_gid)
    assert by_name.group == grp.getgrgid(NOBODY.pw_gid).gr_name
    assert set(by_name.groups) == set(os.getgrouplist("nobody", NOBODY.pw_gid))
    assert resolve(str(NOBODY.pw_uid)) == by_name
    assert resolve("nobody", "mail").gid == grp.getgrnam("mail").gr_gid
    assert resolve("987654321", "12345") == Identity("987654321", "12345", 987654321, 12345, (12345,), "/")


@pytest.mark.parametrize(
    ("user", "group", "says"),
    [
        (
            "no-such-account",
            None,
            "process.user: there is no account no-such-account; useradd --system no-such-account",
        ),
        ("nobody", "no-such-group", "process.group: there is no group no-such-group"),
        ("987654321", None, "987654321 has no account here, so no group either; write `group: number`"),
        ("4294967295", None, "there is no account 4294967295"),
        ("-1", None, "there is no account -1"),
        ("root", None, "process.user: root would serve mail as root"),
        ("0", "mail", "process.user: root would serve mail as root"),
        ("nobody", "root", "process.group: nobody would be in the group root"),
    ],
)
def test_what_cannot_be_resolved(user: str, group: str | None, says: str) -> None:
    with pytest.raises(PrivilegeError) as error:
        resolve(user, group)
    assert says in str(error.value)


def test_an_account_in_the_group_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 0])
    with pytest.raises(PrivilegeError, match=r"process\.user: nobody would be in the group root"):
        resolve("nobody")


def test_choice_of_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert choose("nobody") == privileges.Choice(resolve("nobody"))
    monkeypatch.setattr(privileges, "DEFAULT_ACCOUNTS", ("no-such-account", "nobody"))
    choice = choose(None)
    assert choice.identity == resolve("nobody") and "without process.user: mail is served as nobody" in choice.warning
    monkeypatch.setattr(privileges, "OWN_ACCOUNT", "nobody")
    assert choose(None) == privileges.Choice(resolve("nobody"))
    monkeypatch.setattr(privileges, "DEFAULT_ACCOUNTS", ("no-such-account",))
    with pytest.raises(PrivilegeError, match="write `user: name` below `process`"):
        choose(None)


def test_choice_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY.pw_uid)
    monkeypatch.setattr(os, "getegid", lambda: NOBODY.pw_gid)
    assert choose(None) == privileges.Choice(None)
    assert choose("nobody") == privileges.Choice(None)
    with pytest.raises(PrivilegeError, match="only root can become mail:mail; start the gateway as root, or remove it"):
        choose("mail")


# --- drop: in a process of its own


DROP = """
import ctypes, json, os, sys
from gateway.service.privileges import Identity, PrivilegeError, drop
{before}
memory = os.memfd_create("key")
os.write(memory, b"secret")
try:
    drop({identity}, stays_root={stays_root})
except PrivilegeError as error:
    print(json.dumps(str(error)))
    sys.exit()
def works(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps(dict(
    uids=os.getresuid(), gids=os.getresgid(), groups=os.getgroups(), home=os.environ["HOME"], user=os.environ["USER"],
    capabilities=[status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")], new=status["NoNewPrivs"].strip(),
    dumpable=ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), memory=open(f"/proc/self/fd/{{memory}}").read(),
    back=works(lambda: os.setuid(0)) or works(lambda: os.setgid(0)) or works(lambda: os.setgroups([0])),
    reads=works(lambda: open("/etc/shadow")), chroot=works(lambda: os.chroot("/")),
)))
"""


def dropped(identity: Identity | None, before: str = "", *, stays_root: bool = False) -> object:
    program = DROP.format(identity=repr(identity), before=before, stays_root=stays_root)
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@as_root
def test_drop_is_for_good() -> None:
    assert dropped(OTHER) == {
        "uids": [4242] * 3,
        "gids": [4343] * 3,
        "groups": [4343, 4444],
        "home": "/home/other",
        "user": "other",
        "capabilities": ["0000000000000000"] * 4,
        "new": "1",
        "dumpable": 0,
        "memory": "secret",  # keys that root read are still there
        "back": False,
        "reads": False,
        "chroot": False,
    }


@as_root
def test_drop_gives_up_capabilities_of_an_account_that_stays() -> None:
    ambient = """
libc = ctypes.CDLL(None)
libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
os.setgroups([]), os.setresgid(4343, 4343, 4343), os.setresuid(4242, 4242, 4242)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(1 << 10, 1 << 10, 1 << 10, 0, 0, 0)
assert libc.capset(header, sets) == 0
assert libc.prctl(47, 2, 10, 0, 0) == 0  # as AmbientCapabilities=CAP_NET_BIND_SERVICE
os.environ["USER"] = "as before"
"""
    found = dropped(None, ambient)
    assert isinstance(found, dict)
    assert found["capabilities"] == ["0000000000000000"] * 4
    assert (found["uids"], found["user"], found["new"], found["back"]) == ([4242] * 3, "as before", "1", False)


@as_root
def test_root_that_stays_has_nothing_but_its_files() -> None:
    """Where nobody else can read the installation."""
    found = dropped(None, 'os.environ["USER"] = "root"', stays_root=True)
    assert isinstance(found, dict)
    assert found["capabilities"] == ["0000000000000000"] * 4
    assert (found["uids"], found["new"], found["dumpable"], found["chroot"]) == ([0] * 3, "1", 0, False)


@as_root
def test_drop_that_fails() -> None:
    assert dropped(None) == "still root: write `user: name` below `process`"
    assert str(dropped(OTHER, "os.setresuid(4141, 4141, 4141)")).startswith("cannot become other: Operation not permit")
    without_change = "os.setresuid = lambda *ids: None"
    assert dropped(OTHER, without_change) == "still not wholly other: user, group or groups are others"


# --- files that the supervisor makes


@as_root
def test_chown(tmp_path: Path) -> None:
    log_file, place = tmp_path / "mail.log", tmp_path / "admin.sock"
    log_file.touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place))
        for path in (log_file, place, tmp_path):
            chown_for(path, OTHER)
            assert (path.stat().st_uid, path.stat().st_gid) == (4242, 4343)
            chown_for(path, None)
            assert path.stat().st_uid == 4242


@as_root
def test_links_are_not_given_away(tmp_path: Path) -> None:
    precious = tmp_path / "shadow"
    precious.touch()
    (tmp_path / "soft").symlink_to(precious)
    (tmp_path / "hard").hardlink_to(precious)
    for name in ("soft", "hard"):
        with pytest.raises(PrivilegeError, match="a link; it is not given to other"):
            chown_for(tmp_path / name, OTHER)
    assert precious.stat().st_uid == 0
    with pytest.raises(PrivilegeError, match="missing: cannot give it to other: No such file"):
        chown_for(tmp_path / "missing", OTHER)


@as_root
def test_folder_for_state(tmp_path: Path) -> None:
    state = tmp_path / "lib" / "gateway"
    directory_for(state, OTHER)
    assert state.stat().st_uid == 4242 and stat.S_IMODE(state.stat().st_mode) == 0o750
    (state / "profiles").touch()
    directory_for(state, OTHER)
    with pytest.raises(PrivilegeError, match=f"third cannot write to it; chown -R third:others {state}"):
        directory_for(state, replace(OTHER, user="third", uid=5, groups=()))
    assert state.stat().st_uid == 4242
    empty = tmp_path / "empty"
    empty.mkdir()
    directory_for(empty, OTHER)
    assert empty.stat().st_uid == 4242


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrivilegeError, match="cannot be made or read"):
        directory_for(tmp_path / "file" / "below", None)
    directory_for(tmp_path / "mine", None)
    assert (tmp_path / "mine").is_dir()


def test_what_an_account_cannot_reach(tmp_path: Path) -> None:
    code = tmp_path / "closed" / "gateway"
    code.mkdir(parents=True)
    (code / "__init__.py").touch(mode=0o644)
    for folder in (tmp_path, *tmp_path.parents):  # pytest's own folders are closed too
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest", "test_", "popen")):
            folder.chmod(0o755)
    assert unreachable(code / "__init__.py", OTHER) is None
    (tmp_path / "closed").chmod(0o700)
    assert unreachable(code / "__init__.py", OTHER) == tmp_path / "closed"
    owner = replace(OTHER, uid=os.geteuid())
    assert unreachable(code / "__init__.py", owner) is None
    (tmp_path / "closed").chmod(0o750)
    assert unreachable(code, replace(OTHER, groups=(os.getegid(),))) is None
    (code / "__init__.py").chmod(0o640)
    assert unreachable(code / "__init__.py", replace(OTHER, groups=())) == tmp_path / "closed"
    (tmp_path / "closed").chmod(0o711)
    assert unreachable(code / "__init__.py", OTHER) == code / "__init__.py"
    assert unreachable(code / "gone", OTHER) == code / "gone"
    assert unreachable(code, None) is None


@as_root
def test_where_an_account_may_replace_what_root_reads(tmp_path: Path) -> None:
    """In a folder of its own or of its group, there or on the way, also behind a link; not in one like /tmp."""
    keys, link = tmp_path / "keys", tmp_path / "link"
    keys.mkdir(mode=0o755)
    link.symlink_to(keys)
    for file in (keys / "mx.key", link / "mx.key"):
        keys.chmod(0o755)
        os.chown(keys, 0, 0)
        assert replaceable(file, OTHER) is None
        keys.chmod(0o777)
        assert replaceable(file, OTHER) in (keys, link)
        keys.chmod(0o1777)
        assert replaceable(file, OTHER) is None
        keys.chmod(0o775)
        os.chown(keys, 0, OTHER.groups[0])
        assert replaceable(file, OTHER) in (keys, link)
        keys.chmod(0o555)
        os.chown(keys, OTHER.uid, 0)
        assert replaceable(file, OTHER) in (keys, link)
        assert replaceable(file, None) is None
