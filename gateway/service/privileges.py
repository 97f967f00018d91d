"""Which account the service runs as, and how a process becomes it for good.

The supervisor keeps root, if it has it, for ports and keys. What serves mail never does: every process that imports a
stage calls `drop` before. The order is that of setuid(2) and its pitfalls: groups, group, user, then a look at whether
there is a way back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import grp
import os
import pwd
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

OWN_ACCOUNT: Final = "gateway"
"""The account that an installation has for nothing else."""

DEFAULT_ACCOUNTS: Final = (OWN_ACCOUNT, "nobody")
"""Taken in this order where the service is started as root and no account is written."""

NOT_OWN: Final = "started as root without process.user: mail is served as {name}, as other services may be; write one"

UNCHANGED: Final = 0xFFFFFFFF
"""As an id, -1 means "leave it" to setresuid(2), and is therefore no account."""

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 4, 38, 47, 4  # linux/prctl.h
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h


class PrivilegeError(Exception):
    """The service cannot run as this account; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An account: names for messages (a number where the system has no name), ids, supplementary groups, home."""

    user: str
    group: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str = "/"


@dataclass(frozen=True, slots=True)
class Choice:
    """What the service runs as: None is "as it was started". `warning` is for the operator, empty if there is none."""

    identity: Identity | None
    warning: str = ""


def is_root() -> bool:
    """Whether this process may become another account."""
    return os.geteuid() == 0


def choose(user: str | None, group: str | None = None) -> Choice:
    """What `process.user` and `process.group` (None: not written) come to for the process as it was started.

    Root without a written user becomes one of DEFAULT_ACCOUNTS, with a warning if that is not OWN_ACCOUNT. Anybody
    else stays what they are, and may write only that. Raises PrivilegeError.
    """
    if not is_root():
        if user is not None:
            _require_current(resolve(user, group))
        return Choice(None)
    if user is not None:
        return Choice(resolve(user, group))
    for name in DEFAULT_ACCOUNTS:
        with contextlib.suppress(KeyError):
            pwd.getpwnam(name)
            return Choice(resolve(name), "" if name == OWN_ACCOUNT else NOT_OWN.format(name=name))
    raise PrivilegeError("started as root without process.user: write `user: name` below `process`, not root")


def resolve(user: str, group: str | None = None) -> Identity:
    """The account of this name or number, with this group, or else its own.

    Supplementary groups are those that the system's group database has for the account. Raises PrivilegeError for one
    that does not exist, for a number without an account where no group is written, and for root.
    """
    account = _account(user)
    if account is not None:
        uid, name, home = account.pw_uid, account.pw_name, account.pw_dir
        gid = _group(group) if group is not None else account.pw_gid
        groups = tuple(sorted(set(os.getgrouplist(name, gid))))
    elif group is not None:
        uid, name, home = int(user), user, "/"
        gid = _group(group)
        groups = (gid,)
    else:
        raise PrivilegeError(f"process.user: {user} has no account here, so no group either; write `group: number`")
    if uid == 0:
        raise PrivilegeError("process.user: root would serve mail as root; write an account of its own")
    if 0 in groups:
        where = "process.group" if gid == 0 else "process.user"
        raise PrivilegeError(f"{where}: {name} would be in the group root; write an account or group that is not")
    return Identity(name, _group_name(gid), uid, gid, groups, home)


def drop(identity: Identity | None, *, stays_root: bool = False) -> None:
    """Become this account, for good; None keeps the account and gives up all else.

    Root as an account without capabilities (`stays_root`, where there is no other) still owns root's files.

    Afterwards this process and all that it forks or executes have no capability, get no privilege from set-user-ID
    programs (PR_SET_NO_NEW_PRIVS), and leave no core file with passwords or keys, nor can others of the account look
    into them (PR_SET_DUMPABLE). HOME, USER and LOGNAME are the account's. To be called before there is a
    thread: some of it holds for the calling one. Raises PrivilegeError if any of it cannot be done, or could be
    undone; then the process must end.
    """
    try:
        if identity is not None:
            os.setgroups(identity.groups)
            os.setresgid(identity.gid, identity.gid, identity.gid)
            os.setresuid(identity.uid, identity.uid, identity.uid)
            os.environ.update(HOME=identity.home, USER=identity.user, LOGNAME=identity.user)
        _give_up_capabilities()
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_DUMPABLE, 0)
    except OSError as error:
        who = f"become {identity.user}" if identity is not None else "give up privileges"
        raise PrivilegeError(
            f"cannot {who}: {error.strerror or error}; in a container or unit, the account's number must be mapped, "
            "and CAP_SETUID and CAP_SETGID be there"
        ) from None
    _verify(identity, stays_root)


def chown_for(path: Path, identity: Identity | None) -> None:
    """Give what the supervisor made (a file, folder or socket) to the account; None, or its own already: nothing.

    A link is not followed, and a file with several names not given away: who may write to the folder could have put
    it there to be given something else. Raises PrivilegeError.
    """
    if identity is None:
        return
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
                raise PrivilegeError(f"{path}: a link; it is not given to {identity.user}")
            if (found.st_uid, found.st_gid) != (identity.uid, identity.gid):
                os.chown(f"/proc/self/fd/{descriptor}", identity.uid, identity.gid)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise PrivilegeError(f"{path}: cannot give it to {identity.user}: {error.strerror or error}") from None


def socket_file(path: str, *, mode: int | None = None, owner: tuple[int, int] | None = None) -> None:
    """Give the file of a socket that we bound a mode, and as root an owner (uid, gid). Raises OSError.

    Through a descriptor, and only to a socket with one name: who may write to the folder could have put something else
    in its place. To set the mode it is ours for a moment, since another's needs CAP_FOWNER.
    """
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISSOCK(found.st_mode) or found.st_nlink > 1:
            raise PermissionError(errno.EPERM, "something else is in the socket's place", path)
        file = f"/proc/self/fd/{descriptor}"
        if mode is not None:
            if is_root() and found.st_uid != 0:
                os.chown(file, 0, 0)
                owner = owner or (found.st_uid, found.st_gid)
            os.chmod(file, mode)
        if owner is not None and is_root():
            os.chown(file, *owner)
    finally:
        os.close(descriptor)


def directory_for(path: Path, identity: Identity | None, mode: int = 0o750) -> None:
    """Make sure that the folder is there and that the account may write to it, such as `state_directory`.

    One that is missing or empty becomes the account's. One with something in it is left alone: it may be another's.
    Raises PrivilegeError if it is one that the account cannot write to.
    """
    try:
        new = not path.exists()
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        empty = next(iter(path.iterdir()), None) is None
    except OSError as error:
        raise PrivilegeError(f"{path}: cannot be made or read: {error.strerror or error}") from None
    if identity is None:
        return
    if new or empty:
        chown_for(path, identity)
    elif not _may(identity, path.stat(), 0o3):
        raise PrivilegeError(
            f"{path}: {identity.user} cannot write to it; chown -R {identity.user}:{identity.group} {path}"
        )


def unreachable(path: Path, identity: Identity | None) -> Path | None:
    """The first folder on the way to `path`, or the path itself, that the account may not enter or read.

    None if it may read all. For an error text before privileges are gone, such as for code below /root; by owner and
    mode alone, without access control lists.
    """
    if identity is None:
        return None
    target = Path(os.path.abspath(path))
    for step in (*reversed(target.parents), target):
        try:
            found = step.stat()
        except OSError:
            return step
        enter = 0o1 if stat.S_ISDIR(found.st_mode) else 0
        if not _may(identity, found, enter | (0o4 if step == target else 0)):
            return step
    return None


def replaceable(path: Path, identity: Identity | None) -> Path | None:
    """The folder in which the account may put something else in the place of this file, or of a folder on its way.

    None if there is none. What root reads from there on the account's behalf is whatever the account wants it to be.
    """
    if identity is None:
        return None
    lexical = Path(os.path.abspath(path))
    for folder in dict.fromkeys((*lexical.parents, *Path(os.path.realpath(path)).parents)):
        try:
            found = folder.stat()
        except OSError:
            continue
        if found.st_uid == identity.uid or (_may(identity, found, 0o2) and not found.st_mode & stat.S_ISVTX):
            return folder
    return None


def _may(identity: Identity, found: os.stat_result, bits: int) -> bool:
    """Whether mode and owner let the account read (4), write (2), execute or enter (1)."""
    if found.st_uid == identity.uid:
        shift = 6
    elif found.st_gid == identity.gid or found.st_gid in identity.groups:
        shift = 3
    else:
        shift = 0
    return (found.st_mode >> shift) & bits == bits


def _require_current(identity: Identity) -> None:
    if identity.uid == os.geteuid() and identity.gid in (os.getegid(), *os.getgroups()):
        return
    raise PrivilegeError(
        f"process.user: only root can become {identity.user}:{identity.group}; start the gateway as root, or remove it"
    )


def _account(user: str) -> pwd.struct_passwd | None:
    """None for a number that no account has. Names come first: a name may consist of digits."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(user)
    number = _number(user)
    if number is None:
        raise PrivilegeError(f"process.user: there is no account {user}; useradd --system {user}, or write another")
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(number)
    return None


def _group(group: str) -> int:
    with contextlib.suppress(KeyError):
        return grp.getgrnam(group).gr_gid
    number = _number(group)
    if number is None:
        raise PrivilegeError(f"process.group: there is no group {group}; groupadd --system {group}, or write another")
    return number


def _group_name(gid: int) -> str:
    with contextlib.suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)


def _number(text: str) -> int | None:
    if text.isascii() and text.isdigit() and int(text) < UNCHANGED:
        return int(text)
    return None


def _prctl(option: int, value: int) -> None:
    """prctl(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), *(ctypes.c_ulong(0),) * 3) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _give_up_capabilities() -> None:
    """All sets of capset(2), and the ambient one. Only the bounding set stays, which gives nothing by itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)  # version, this process
    nothing = (ctypes.c_uint32 * 6)()  # twice effective, permitted, inheritable
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if libc.capset(ctypes.byref(header), ctypes.byref(nothing)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _verify(identity: Identity | None, stays_root: bool) -> None:
    """Raises PrivilegeError if anything is left, or comes back when asked for."""
    if identity is not None:
        ids = (os.getresuid(), os.getresgid(), set(os.getgroups()))
        if ids != ((identity.uid,) * 3, (identity.gid,) * 3, set(identity.groups)):
            raise PrivilegeError(f"still not wholly {identity.user}: user, group or groups are others")
        if _works(lambda: os.setresuid(0, 0, 0)) or _works(lambda: os.setresgid(0, 0, 0)):
            raise PrivilegeError(f"root comes back after becoming {identity.user}")
    if os.geteuid() == 0 and not stays_root:
        raise PrivilegeError("still root: write `user: name` below `process`")
    with open("/proc/self/status") as status:
        sets = dict(line.split(":", 1) for line in status if line.startswith("Cap"))
    if any(int(sets[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")):
        raise PrivilegeError("capabilities are left")


def _works(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True
