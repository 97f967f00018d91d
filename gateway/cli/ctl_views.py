"""Which columns of the admin API's answers `gateway ctl` shows, and how."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, cast

from gateway.cli.ctl_tables import Table, columns, duration, number, octets, text_of

Object = Mapping[str, object]

MOST_LIMITS: Final = 1000
"""Of one answer to GET /limits, unless it is asked for another number."""


def rows(answer: Object, name: str) -> list[Object]:
    """The list of that name."""
    return cast("list[Object]", answer.get(name) or [])


def mapping(answer: Object, name: str) -> Object:
    """The object of that name."""
    return cast(Object, answer.get(name) or {})


def clock(seconds: object) -> str:
    """A time in UTC to the second."""
    return datetime.fromtimestamp(number(seconds), UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def status_lines(info: Object, stats: Object) -> list[str]:
    """What is above the table of workers."""
    states = ", ".join(f"{count} {state}" for state, count in mapping(stats, "states").items())
    found = [
        f"gateway {text_of(info['version'])} (Python {text_of(info['python'])}), pid {text_of(info['pid'])}",
        f"{text_of(info['state'])}, generation {text_of(info['generation'])}, up {duration(info['seconds'])}, "
        f"{text_of(info['restarts'])} worker restarts",
        f"{text_of(stats['sessions'])} sessions" + (f": {states}" if states else ""),
    ]
    if info.get("reason"):
        found += [f"reason: {line}" for line in text_of(info["reason"]).splitlines()]
    return found


def workers(info: Object, stats: Object) -> Table:
    """The supervisor's list, with what each worker says of itself."""
    said = {(row["generation"], row["worker"]): row for row in rows(stats, "workers")}
    found = []
    for row in rows(info, "workers"):
        own = said.get((row["generation"], row["worker"]), {})
        found.append([
            text_of(row["generation"]), text_of(row["worker"]), text_of(row["pid"]), text_of(row["state"]),
            text_of(own.get("sessions", "no answer")), octets(own.get("memory")), duration(own.get("cpu")),
            text_of(own.get("descriptors")), duration(time.time() - number(row["started"])),
        ])  # fmt: skip
    heads = ">generation >worker >pid state >sessions >memory >cpu >descriptors >up"
    return Table(columns(heads), found, "no worker runs")


SESSIONS = columns("id pipeline client user protocol tls state upstream >seconds >in >out >messages >worker")


def session_cells(row: Object) -> list[str]:
    """A session in one line."""
    return [
        text_of(row["id"]), text_of(row["pipeline"]), text_of(row["client"]), text_of(row["user"]),
        text_of(row["protocol"]), text_of(row["tls"]), text_of(row["state"]), text_of(row["upstream"]),
        duration(row["seconds"]), octets(row["bytes_in"]), octets(row["bytes_out"]), text_of(row["transactions"]),
        f"{row['generation']}.{row['worker']}",
    ]  # fmt: skip


def sessions(answer: Object) -> Table:
    """Sessions, the youngest first."""
    return Table(SESSIONS, [session_cells(row) for row in rows(answer, "sessions")], "no sessions")


def session_count(answer: Object) -> str:
    """How many there are beside those that are shown; empty if none are."""
    listed, matched, total = len(rows(answer, "sessions")), number(answer["matched"]), number(answer["total"])
    return f"{listed} of {matched:g} that match, {total:g} in all" if listed < total else ""


def session_tables(answer: Object) -> list[tuple[str, Table]]:
    """A session in parts, each with its heading."""
    apart = ("facts", "transaction", "verdicts", "stage_ms", "log")
    head = [[name.replace("_", " "), text_of(value)] for name, value in answer.items() if name not in apart]
    parts = [("", Table(columns("key value"), head))]
    facts = [[name, text_of(value)] for name, value in mapping(answer, "facts").items()]
    parts.append(("facts", Table(columns("fact value"), facts)))
    transaction = mapping(answer, "transaction")
    if transaction:
        cells = [["sender", text_of(transaction["sender"])], ["size", octets(transaction["size"])]]
        cells += [["recipient", f"{row['address']} {row['reply']}"] for row in rows(transaction, "recipients")]
        cells += [["refused", f"{row['address']} {row['reply']}"] for row in rows(transaction, "refused")]
        parts.append(("open message", Table(columns("key value"), cells)))
    taken = mapping(answer, "stage_ms")
    seen = [[text_of(row[name]) for name in ("stage", "phase", "verdict", "mode")] for row in rows(answer, "verdicts")]
    parts.append(("stages so far", Table(columns("stage phase verdict mode"), seen)))
    parts.append(("time", Table(columns("stage >ms"), [[name, text_of(ms)] for name, ms in taken.items()])))
    parts.append(("log", Table(columns("time level record keys"), [_record(row) for row in rows(answer, "log")])))
    return [(heading, table) for heading, table in parts if table.rows]


def _record(row: Object) -> list[str]:
    known = ("time", "level", "logger", "record", "session", "pipeline", "client")
    keys = " ".join(f"{name}={text_of(value)}" for name, value in row.items() if name not in known)
    return [text_of(row.get(name)) for name in ("time", "level", "record")] + [keys]


def upstreams(answer: Object) -> Table:
    """One line a server."""
    found = []
    for pool in rows(answer, "upstreams"):
        for server in rows(pool, "servers"):
            states = mapping(server, "states")
            state = text_of(server["state"])
            if len(states) > 1:
                state = ", ".join(f"{one} ({count})" for one, count in states.items())
            found.append([
                text_of(pool["pipeline"]), text_of(pool["name"]), text_of(server["url"]), state,
                text_of(server["weight"]), f"{100 * number(server.get('share')):.0f}%", text_of(server["total"]),
                text_of(server["idle"]), text_of(pool["waiting"]), text_of(server.get("latency_ms")),
                text_of(server.get("last_error")),
            ])  # fmt: skip
    heads = "pipeline pool server state >weight >of_weight >active >idle >waiting >ms last_error"
    return Table(columns(heads), found, "no upstreams")


def limits(answer: Object) -> Table:
    """What is counted."""
    found = [
        [text_of(row["key"]), text_of(row["kind"]), "-" if row["kind"] == "value" else text_of(row["count"]),
         "-" if row["expires"] is None else duration(row["expires"])]
        for row in rows(answer, "limits")
    ]  # fmt: skip
    return Table(columns("key kind >count >expires"), found, "nothing is counted")


def limits_left_off(answer: Object) -> str:
    """That there may be more than the API gives at once; empty if it gave all."""
    return f"the first {MOST_LIMITS}; a PREFIX shows others" if len(rows(answer, "limits")) >= MOST_LIMITS else ""


def bans(answer: Object) -> Table:
    """Who is banned, and for how long yet."""
    found = [
        [text_of(row["network"]), text_of(row["pipeline"]), text_of(row["stage"]), duration(row["seconds"]),
         clock(row["until"]), text_of(row["level"]), text_of(row["by"]), text_of(row["reason"])]
        for row in rows(answer, "bans")
    ]  # fmt: skip
    return Table(columns("network pipeline stage >left until >level by reason"), found, "nobody is banned")


def certificates(answer: Object) -> Table:
    """Certificates, the first to expire first."""
    found = [
        [text_of(row["names"]), text_of(row["chain"]), clock(row["not_after"]), text_of(row["days"]),
         text_of(row["issuer"]), text_of(row["listeners"])]
        for row in rows(answer, "certificates")
    ]  # fmt: skip
    return Table(columns("names file expires >days issuer listeners"), found, "no certificates")
