"""What a soak found: is everything as promised, and the Markdown that says so."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from bench.measured import machine
from bench.soak import IDLERS, KILL_AT, RELOADS_AT, WARM_UP, WORKERS, Ran
from bench.supervised import Member
from bench.trend import Trend, fit

BEGIN, END = "<!-- soak: written by `make soak` -->", "<!-- soak: end -->"
LEAST_OCTETS = 512 << 10
OCTETS_A_SESSION = 16  # no object of the interpreter is smaller
DESCRIPTORS = 4
PARTS = 12
STORE_SHARE = 0.02
HOUR = 3600.0


class Line(NamedTuple):
    """A process, or several together: its memory (octets) and descriptors after warm-up, and what may be added."""

    name: str
    begin: float
    memory: Trend
    descriptors: Trend
    sessions: float  # that it served meanwhile
    octets: float

    @property
    def memory_is_flat(self) -> bool:
        """The line rises by no more than what is allowed."""
        return self.memory.growth <= self.octets

    @property
    def descriptors_are_flat(self) -> bool:
        """Sessions have descriptors: what their number sways by is no growth."""
        return self.descriptors.growth <= DESCRIPTORS + 2 * self.descriptors.error * self.descriptors.seconds


def lines(ran: Ran) -> list[Line]:
    """One for each process of the newest generation and the supervisor, and one for all together."""
    warm_up = WARM_UP * ran.minutes * 60
    found, last = [], 0.0
    workers = sum(member.role == "worker" for member in ran.newest)
    for member in ran.newest:
        begin = max(event for event in (ran.since.get(member, 0.0), 0.0)) + warm_up
        last = max(last, begin)
        taken = [sample for sample in ran.samples if sample.at >= begin and member in sample.memory]
        if len(taken) < 3:
            continue
        sessions = ran.rate * (taken[-1].at - taken[0].at) / workers if member.role == "worker" else 0.0
        found.append(Line(
            f"{member.role} {_ordinal(member, ran)}".strip(), begin,
            fit([(sample.at, float(sample.memory[member])) for sample in taken]),
            fit(_lowest([(sample.at, float(sample.descriptors[member])) for sample in taken])),
            sessions, max(LEAST_OCTETS, OCTETS_A_SESSION * sessions),
        ))  # fmt: skip
    taken = [sample for sample in ran.samples if sample.at >= last]
    if len(taken) >= 3:
        sessions = ran.rate * (taken[-1].at - taken[0].at)
        found.append(Line(
            "all together", last,
            fit([(sample.at, float(sum(sample.memory.values()))) for sample in taken]),
            fit(_lowest([(sample.at, float(sum(sample.descriptors.values()))) for sample in taken])),
            sessions, max(LEAST_OCTETS * 2, OCTETS_A_SESSION * sessions),
        ))  # fmt: skip
    return found


def _lowest(samples: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest in each part of the time: a session has descriptors, and for a moment there may be many."""
    size = max(1, len(samples) // PARTS)
    return [min(samples[start : start + size], key=lambda pair: pair[1]) for start in range(0, len(samples), size)]


def _ordinal(member: Member, ran: Ran) -> str:
    same = sorted(other.pid for other in ran.newest if other.role == member.role)
    return str(same.index(member.pid) + 1) if len(same) > 1 else ""


def faults(ran: Ran) -> list[str]:
    """What is not as promised."""
    return list(_faults(ran))


def _faults(ran: Ran) -> Iterator[str]:
    fate = ran.fate
    if fate.lost:
        yield f"{fate.lost} acknowledged messages are not at the sink"
    if fate.doubled:
        yield f"{fate.doubled} messages are at the sink more than once"
    for name, count in _unwanted(ran).items():
        yield f"sessions that ended otherwise than they should: {name}, {count}"
    if ran.result.not_started:
        yield f"{ran.result.not_started} sessions were not begun because too many were open: the service fell behind"
    if fate.silent and not ran.killed:
        yield f"{fate.silent} messages are at the sink without having been acknowledged"
    found = lines(ran)
    if len(found) < len(ran.newest) + 1:
        yield "the run was too short for the slope of every process"
    for line in found:
        if not line.memory_is_flat:
            yield f"memory grows: {line.name}, {line.memory.growth / 1024:.0f} KiB in {line.memory.seconds:.0f} s"
        if not line.descriptors_are_flat:
            yield f"descriptors grow: {line.name}, {line.descriptors.growth:.1f} in {line.descriptors.seconds:.0f} s"
    for role, counts in ran.after.items():
        if max(counts) > max(ran.before.get(role, [0])):
            yield f"descriptors at rest: {role} had {ran.before.get(role)}, has {counts}"
    store = store_trend(ran)
    if store.growth > STORE_SHARE * store.mean:
        yield f"the store grows: {store.growth / 1024:.0f} KiB in {store.seconds:.0f} s"
    for record, count in ran.records.items():
        if count > (record == "worker_died" and ran.killed):
            yield f"the log has {count} records {record}"


def store_trend(ran: Ran) -> Trend:
    """Of what the store takes on disk."""
    begin = WARM_UP * ran.minutes * 60
    return fit([(sample.at, float(sample.store)) for sample in ran.samples if sample.at >= begin])


def _unwanted(ran: Ran) -> dict[str, int]:
    """Ends of sessions that nothing in the plan explains: banned clients are, idle ones at a reload are."""
    unwanted: dict[str, int] = {}
    for name, count in ran.result.ended.items():
        kind, _, how = name.partition(": ")
        explained = kind in ("erring", "idle") or (ran.killed and how == "lost")
        if how != "done" and not explained:
            unwanted[name] = count
    ended: dict[str, int] = {}
    for name, count in ran.result.ended.items():
        ended[name.partition(": ")[0]] = ended.get(name.partition(": ")[0], 0) + count
    for kind, count in ran.result.started.items():
        if kind != "idle" and count > ended.get(kind, 0):
            unwanted[f"{kind}: no end"] = count - ended.get(kind, 0)
    return unwanted


def report(ran: Ran) -> str:
    """The text between the markers."""
    wrong = faults(ran)
    verdict = "**All as promised; memory and descriptors are flat.**" if not wrong else "**Not as promised:**"
    events = ", ".join(f"{what} at {at:.0f} s" for at, what in ran.events)
    plan = f"reloads at {' and '.join(f'{share:.0%}' for share in RELOADS_AT)} of the time"
    if ran.killed:
        plan += f", a worker killed at {KILL_AT:.0%}"
    parts = [
        BEGIN, "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {machine()}, 2 cores that gateway, client and sink share; "
        f"Python {platform.python_version()} on uvloop, {WORKERS} workers, store lmdb, {plan} ({events}).", "",
        f"The machine carried {ran.capacity:.0f} sessions a second with everything on it; {ran.rate:.0f} a second were "
        f"begun for {ran.minutes:g} minutes, whether earlier ones had ended or not, beside {IDLERS} IMAP sessions that "
        "idle.", "",
        verdict, *(f"- {text}" for text in wrong), "",
        *_load(ran), "", *_memory(ran), "", *_minutes(ran), "", *_rest(ran), "", END,
    ]  # fmt: skip
    return "\n".join(parts)


def _load(ran: Ran) -> Iterator[str]:
    fate, result = ran.fate, ran.result
    yield "| messages begun | acknowledged | at the sink | lost | doubled | at the sink, not acknowledged |"
    yield "|---|---|---|---|---|---|"
    yield f"| {fate.messages} | {fate.acknowledged} | {fate.arrived} | {fate.lost} | {fate.doubled} | {fate.silent} |"
    yield ""
    yield "The messages are those of the part that found the capacity, too. Sessions of the paced part:"
    yield ""
    yield "| sessions | begun | as planned | refused, cut or without an answer | ms, median | 99 % | longest |"
    yield "|---|---|---|---|---|---|---|"
    for kind, times in result.sessions.items():
        begun, good = result.started[kind], result.ended.get(f"{kind}: done", 0)
        half, most, longest = (_quantile(times, share) for share in (0.5, 0.99, 1.0))
        yield f"| {kind} | {begun} | {good} | {begun - good} | {half} | {most} | {longest} |"
    idle, cut = result.started.get("idle", 0), result.ended.get("idle: lost", 0)
    yield f"| idle | {idle} | {result.ended.get('idle: done', 0)} | {cut} | | | |"
    yield ""
    told = "; ".join(f"{text} ({count})" for text, count in sorted(result.said.items())) or "nothing"
    yield (
        "Clients that err are to be banned for a while, idle ones are sent away by a reload: both come back. What "
        f"clients were told that were refused: {told}. The longest wait for one answer was {result.longest * 1000:.0f} "
        f"ms ({result.longest_step or 'greeting'})."
    )


def _quantile(times: Mapping[str, int], share: float) -> int:
    wanted, seen = share * sum(times.values()), 0
    for ms, count in sorted((int(ms), count) for ms, count in times.items()):
        seen += count
        if seen >= wanted:
            return ms
    return 0


def _memory(ran: Ran) -> Iterator[str]:
    yield (
        f"A line by least squares through what was seen each second, from {WARM_UP:.0%} of the time after a process "
        "began (or the load did) to the end; memory is the proportional share (Pss). *Flat* is memory whose line "
        f"rises by at most {OCTETS_A_SESSION} octets for each session that the process served meanwhile, which is less "
        f"than the smallest object that a session could leave behind, or by {LEAST_OCTETS >> 10} KiB if that is more "
        "(allocators take memory in steps). Sessions have descriptors, so that their line goes through the lowest "
        f"number in each of {PARTS} parts of the time; it is flat if it rises by at most {DESCRIPTORS} beyond twice "
        "its standard error, and a process has no more at rest, without sessions, than it had."
    )
    yield ""
    yield (
        "| process | from | for | memory, MiB | KiB an hour | in that time, KiB (allowed) | descriptors | an hour "
        "| at rest before, after | |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for line in lines(ran):
        role = line.name.split()[0]
        rest = f"{_plain(ran.before.get(role))}, {_plain(ran.after.get(role))}" if role != "all" else ""
        flat = "flat" if line.memory_is_flat and line.descriptors_are_flat else "**grows**"
        memory, files = line.memory, line.descriptors
        yield (
            f"| {line.name} | {line.begin:.0f} s | {memory.seconds:.0f} s | {memory.mean / 2**20:.1f} "
            f"| {memory.slope * HOUR / 1024:+.0f} ± {2 * memory.error * HOUR / 1024:.0f} "
            f"| {memory.growth / 1024:+.0f} ({line.octets / 1024:.0f}) "
            f"| {files.mean:.0f} | {files.slope * HOUR:+.0f} ± {2 * files.error * HOUR:.0f} | {rest} | {flat} |"
        )


def _plain(counts: list[int] | None) -> str:
    return " and ".join(map(str, counts)) if counts else "none"


def _minutes(ran: Ran) -> Iterator[str]:
    yield "| at, s | memory of all, MiB | of the workers | descriptors of all | open sessions | store, KiB |"
    yield "|---|---|---|---|---|---|"
    step = max(1, len(ran.samples) // 10)
    for sample in ran.samples[::step]:
        workers = sum(octets for member, octets in sample.memory.items() if member.role == "worker")
        yield (
            f"| {sample.at:.0f} | {sum(sample.memory.values()) / 2**20:.1f} | {workers / 2**20:.1f} "
            f"| {sum(sample.descriptors.values())} | {sample.sessions} | {sample.store >> 10} |"
        )


def _rest(ran: Ran) -> Iterator[str]:
    sessions = sum(count for kind, count in ran.result.started.items() if kind != "idle")
    yield "| CPU of | s | ms a session | share of the machine |"
    yield "|---|---|---|---|"
    for group, seconds in ran.cpu.items():
        share = seconds / (ran.minutes * 60 * 2)
        yield f"| {group} | {seconds:.1f} | {seconds / sessions * 1000:.3f} | {share:.1%} |"
    yield ""
    yield (
        f"The machine was idle for {ran.machine['idle']:.0%} of the time; {ran.machine['softirq']:.0%} went to soft "
        f"interrupts, {ran.machine['steal']:.1%} were stolen from it. The event loops were late by at most "
        f"{_late(ran.lag, 0.5)} in half of the looks at them, {_late(ran.lag, 0.99)} in 99 %, {_late(ran.lag, 1.0)} in "
        f"all. The store took {store_trend(ran).mean / 2**20:.1f} MiB on disk. In the log: "
        + ", ".join(f"`{record}` {count}" for record, count in ran.records.items()) + "."
    )  # fmt: skip


def _late(lag: Mapping[str, float], share: float) -> str:
    """The end of the bucket below which that share is."""
    ends = sorted((float(end), count) for end, count in lag.items())
    wanted = share * ends[-1][1] if ends else 0.0
    return next((f"{end * 1000:g} ms" for end, count in ends if count >= wanted), "nothing")


def inserted(page: str, text: str) -> str:
    """The page with the text between its markers, or at its end."""
    before, begin, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before.rstrip()}\n\n{text}\n" if not begin else f"{before}{text}{after}"
