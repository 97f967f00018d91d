"""An installation that every account can reach, for services that give up root; needs root.

Where the interpreter, its packages or the sources lie below a folder that only root may enter (root's home, a private
folder for tests), a mount namespace of its own shows the command an empty folder in its place, with just those.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from gateway.service.privileges import resolve, unreachable
from tests.peers.require import missing, require, require_root

ROOT = Path(__file__).resolve().parents[2]


def barred(path: Path) -> Path | None:
    """The uppermost folder on the way that others may not enter."""
    return unreachable(path, resolve("nobody"))


def for_everybody(*more: Path) -> list[str]:
    """What to write in front of a command so that any account reaches the installation, and these folders."""
    require_root()
    wanted = [Path(sys.prefix), Path(sys.base_prefix), ROOT, *more]
    lines, hidden = ["set -e", "bound=$(mktemp -d)"], set()
    for number, path in enumerate(wanted):
        folder = barred(path)
        if folder is not None:
            hidden.add(folder)
            lines += [f"mkdir $bound/{number}", f"mount --bind {shlex.quote(str(path))} $bound/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(folder))}" for folder in hidden]
    for number, path in enumerate(wanted):
        if barred(path) is not None:
            quoted = shlex.quote(str(path))
            lines += [f"mkdir -p {quoted}", f"mount --bind $bound/{number} {quoted}", f"umount $bound/{number}"]
    lines += ["rm -r $bound", 'exec "$@"']
    command = [require("unshare"), "--mount", "--propagation", "private", "/bin/sh", "-c", "\n".join(lines), "sh"]
    done = subprocess.run([*command, "true"], capture_output=True, text=True)
    if done.returncode:
        missing(f"no mount namespaces here: {done.stderr}")
    return command
