"""The last log records of this process, for whoever looks at a session that is still open.

Records that no sink wanted because of their level are not among them.
"""

from __future__ import annotations

from collections import deque
from typing import Final, cast

import msgspec

from gateway.observe.lines import Record, as_json

KEPT: Final = 2000

records: Final[deque[Record]] = deque(maxlen=KEPT)
"""The records, the last one at the right; `logs.py` appends them as they are written."""


def of(session_id: str) -> list[dict[str, object]]:
    """The records of a session in their order, as the JSON of the log has them: without secrets."""
    found = [record for record in records if record.get("session") == session_id]
    return [cast("dict[str, object]", msgspec.json.decode(as_json(record, 0.0))) for record in found]
