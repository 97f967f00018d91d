"""miltertest: an MTA's side of the milter protocol that follows a script in Lua.

The script begins with `conn` connected; its functions are those of miltertest(8).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from tests.peers.process import LIMIT
from tests.peers.require import require

CONNECT = """\
conn = mt.connect(os.getenv("MILTER"), 40, 0.05)
if conn == nil then error("no connection") end
"""


def miltertest(address: str, script: str, *, limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
    """Run a script against a filter at `unix:/path` or libmilter's `inet:port@host`; status 0 unless it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.lua"
        path.write_text(CONNECT + script)
        return subprocess.run(
            [require("miltertest"), "-s", str(path)], capture_output=True, text=True, timeout=limit, check=False,
            env={**os.environ, "MILTER": address},
        )  # fmt: skip
