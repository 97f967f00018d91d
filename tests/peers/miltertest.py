"""miltertest: an MTA's side of the milter protocol that follows a script in Lua.

The script begins with `conn` connected; its functions are those of miltertest(8). Options are negotiated by its first
function, which also says what comes before and was left out. A step that the filter declined then (SMFIP_NOCONNECT and
its like) ends the script with an error; `mt.negotiate(conn, nil, nil, nil)` and `mt.test_option` tell before.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from tests.peers.process import LIMIT
from tests.peers.require import require

# miltertest itself ends with status 1 and says nothing of a script that failed.
FRAME = """\
conn = mt.connect(os.getenv("MILTER"), 40, 0.05)
if conn == nil then error("no connection") end
local done, why = pcall(function()
%s
end)
if not done then
    print(why)
    error(why)
end
"""


def miltertest(address: str, script: str, *, limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
    """Run a script against a filter at `unix:/path` or libmilter's `inet:port@host`.

    Status 0 unless it failed; then its output ends with the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.lua"
        path.write_text(FRAME % script)
        return subprocess.run(
            [require("miltertest"), "-s", str(path)], capture_output=True, text=True, timeout=limit, check=False,
            env={**os.environ, "MILTER": address},
        )  # fmt: skip
