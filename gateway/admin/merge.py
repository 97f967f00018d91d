"""The answers of several workers made one; what a refusal or a silence of theirs means for the caller."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, cast

from gateway.admin.hub import Answer, Json

Row = dict[str, Json]

DAY: Final = 86_400
_STATUS: Final = re.compile(r"([45]\d\d) (.+)", re.DOTALL)


class Refusal(Exception):
    """The caller gets this status of HTTP and text, and what `more` has."""

    def __init__(self, status: int, text: str, **more: Json) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.more = more


def given(answers: Sequence[Answer]) -> list[Answer]:
    """Those with a result, the newest generation first, its workers in order. Raises Refusal if there is none.

    A refusal in words counts more than a silence: what the newest generation says.
    """
    ordered = sorted(answers, key=lambda answer: (-answer["generation"], answer["worker"]))
    good = [answer for answer in ordered if not answer["error"]]
    if good:
        return good
    for answer in ordered:
        found = _STATUS.fullmatch(answer["error"])
        if found is not None:
            raise Refusal(int(found[1]), found[2])
    raise Refusal(503, ordered[0]["error"] if ordered else "no worker serves")


def missing(answers: Sequence[Answer]) -> list[Json]:
    """Who did not answer, and why: without them the answer is not complete."""
    return [
        {"generation": answer["generation"], "worker": answer["worker"], "error": answer["error"]}
        for answer in answers
        if answer["error"]
    ]


def newest(answers: Sequence[Answer]) -> list[Answer]:
    """Of those with a result the ones of the newest generation."""
    good = given(answers)
    return [answer for answer in good if answer["generation"] == good[0]["generation"]]


def rows(result: Json) -> list[Row]:
    """A result that is a list of objects."""
    return [dict(row) for row in cast(Sequence[Mapping[str, Json]], result)]


def number(value: Json) -> float:
    """A number that may be missing."""
    return value if isinstance(value, (int, float)) else 0


def sessions(answers: Sequence[Answer], limit: int) -> Row:
    """`{total, matched, sessions}` over all workers, the youngest first; each session with its worker."""
    found: list[Row] = []
    total = matched = 0
    for answer in given(answers):
        result = cast(Mapping[str, Json], answer["result"])
        total += int(number(result["total"]))
        matched += int(number(result["matched"]))
        who: Row = {"worker": answer["worker"], "generation": answer["generation"]}
        found += [{**row, **who} for row in rows(result["sessions"])]
    found.sort(key=lambda row: number(row["seconds"]))
    return {"total": total, "matched": matched, "sessions": found[:limit], "missing": missing(answers)}


def summed(answers: Sequence[Answer], *keys: str) -> list[Row]:
    """Rows that every worker of a generation has, by `keys`: those of the newest, with the sum of `sessions`."""
    found: dict[tuple[Json, ...], Row] = {}
    for answer in newest(answers):
        for row in rows(answer["result"]):
            known = found.setdefault(tuple(row[key] for key in keys), {**row, "sessions": 0})
            known["sessions"] = number(known["sessions"]) + number(row["sessions"])
    return list(found.values())


def upstreams(answers: Sequence[Answer]) -> list[Row]:
    """Each pool once. `active` and `idle` of a server are sums; `states` says how many workers see it in which state.

    The rest is what the first worker says, which watches the servers for all.
    """
    pools: dict[tuple[Json, Json], Row] = {}
    servers: dict[tuple[Json, Json], dict[Json, Row]] = {}
    for answer in newest(answers):
        for pool in rows(answer["result"]):
            key = (pool["pipeline"], pool["name"])
            known = pools.setdefault(key, {**pool, "waiting": 0})
            known["waiting"] = number(known["waiting"]) + number(pool.get("waiting"))
            seen = servers.setdefault(key, {})
            for server in rows(pool["servers"]):
                one = seen.setdefault(server["url"], {**server, "active": 0, "idle": 0, "states": Counter[str]()})
                for name in ("active", "idle"):
                    one[name] = number(one[name]) + number(server.get(name))
                cast("Counter[str]", one["states"])[str(server["state"])] += 1
    for key, pool in pools.items():
        pool["servers"] = list(servers[key].values())
    return list(pools.values())


def stats(answers: Sequence[Answer]) -> Row:
    """Sums over all workers, and each of them; none where all are being replaced."""
    sums: dict[str, float] = {"sessions": 0, "memory": 0, "cpu": 0, "descriptors": 0}
    states, pipelines = Counter[str](), Counter[str]()
    workers: list[Json] = []
    for answer in (answer for answer in answers if not answer["error"]):
        result = cast(Mapping[str, Json], answer["result"])
        for name in sums:
            sums[name] += number(result.get(name))
        states.update(cast(Mapping[str, int], result["states"]))
        pipelines.update(cast(Mapping[str, int], result["pipelines"]))
        workers.append({"generation": answer["generation"], "worker": answer["worker"], **result})
    return {**sums, "states": dict(states), "pipelines": dict(pipelines), "workers": workers,
            "missing": missing(answers)}  # fmt: skip


def counters(totals: Mapping[str, int]) -> Row:
    """The counters of the service, each over all its labels."""
    families: dict[str, int] = {}
    for sample, value in sorted(totals.items()):
        family = sample.partition("{")[0]
        if family.endswith("_total"):
            families[family] = families.get(family, 0) + value
    return dict(families)


def certificates(answers: Sequence[Answer]) -> list[Row]:
    """With the days left until each expires, the first to do so first."""
    found = rows(newest(answers)[0]["result"])
    for row in found:
        row["days"] = int((number(row["not_after"]) - time.time()) // DAY)
    return sorted(found, key=lambda row: number(row["not_after"]))
