"""The table of docs/nginx.md, and what of a script's two outcomes it does not explain."""

from __future__ import annotations

import re
from pathlib import Path

from tests.interop.nginx_legs import Cast, Outcome, without
from tests.interop.nginx_scripts import Script

DOCUMENT = Path(__file__).parents[2] / "docs/nginx.md"
UNSEEN = "not visible to a peer"


def listed() -> dict[str, str]:
    """The rows of the table by their ids. Raises AssertionError if there is no table."""
    _, found, rest = DOCUMENT.read_text().partition("\n## Intended differences\n")
    assert found, f"{DOCUMENT.name} has no table of intended differences"
    rows = re.findall(r"^\| *`([a-z0-9-]+)` *\|(.*)\|$", rest.partition("\n## ")[0], re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows), "an id is there twice"
    return {name: text.strip() for name, text in rows}


def wrong_at_nginx(cast: Cast, outcome: Outcome) -> str:
    """How nginx is not as the script says; empty if it is."""
    return "".join(
        [
            _contrast("client", cast.expected_client(False), outcome.client),
            _contrast("upstream", cast.expected_upstream(False), outcome.upstream),
            _unasked(cast, outcome),
        ]
    )


def wrong_at_gateway(cast: Cast, nginx: Outcome, gateway: Outcome) -> str:
    """How the gateway differs from nginx, or from what the script says of it; empty if it does not."""
    script, other = cast.script, cast.script.gateway
    upstream = nginx.upstream if other.sent is None else cast.expected_upstream(True)
    client = nginx.client if other.steps is None else cast.expected_client(True)
    found = _contrast("client", client, gateway.client) + _contrast("upstream", upstream, gateway.upstream)
    missing, extra = ([cast.header_line(line) for line in lines] for lines in (other.missing, other.extra))
    if missing == ["*"]:
        found += _contrast("auth server", [], gateway.auth)
    elif missing or extra:
        if without(nginx.auth, missing) != without(gateway.auth, extra):
            found += _contrast(f"auth server, less {missing} and with {extra}", nginx.auth, gateway.auth)
    else:
        found += _contrast("auth server", nginx.auth, gateway.auth)
    if script.differs and nginx == gateway:
        found += "they do not differ\n"
    return found


def _unasked(cast: Cast, outcome: Outcome) -> str:
    """Lines that the auth server was not sent in the order of the script."""
    found, rest = "", iter(outcome.auth)
    for line in map(cast.header_line, cast.script.nginx.asked):
        if line.startswith("?!"):
            there = [sent for sent in outcome.auth if sent.startswith(line[3:])]
            found += f"  auth server was sent {there}\n" if there else ""
        elif line not in rest:
            found += f"  auth server was not sent {line!r} there: {outcome.auth}\n"
            rest = iter(outcome.auth)
    return found


def _contrast(what: str, one: list[str] | None, other: list[str]) -> str:
    if one is None or one == other:
        return ""
    width = max(map(len, one), default=0)
    rows = max(len(one), len(other))
    left, right = ([*lines, *[""] * (rows - len(lines))] for lines in (one, other))
    lines = [f"  {'!' if a != b else ' '} {a:{width}}    {b}\n" for a, b in zip(left, right, strict=True)]
    return f"{what}:\n{''.join(lines)}"


def ids_amiss(scripts: list[Script], rows: dict[str, str]) -> list[str]:
    """Ids that a script names and the table does not have, or that the table has and no script shows."""
    used = {name for script in scripts for name in script.differs}
    unknown = [f"{name}: not in the table" for name in sorted(used - set(rows))]
    return unknown + [f"{name}: in no script" for name, text in rows.items() if name not in used and UNSEEN not in text]
