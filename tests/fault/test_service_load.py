"""A service under load: reloads, killed workers, more clients than it has descriptors for."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import resource
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.fault.crowd import Crowd
from tests.fault.load import CountingSink, Prober, Senders, smtp_source
from tests.fault.service import GATEWAY, Service, service

UVLOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["here"])
pytestmark = [pytest.mark.anyio, pytest.mark.slow, UVLOOP]

SOAK = os.environ.get("GATEWAY_SOAK") == "1"
MESSAGES = 20_000 if SOAK else 3_500
ROUND = 500
KILLS = 30 if SOAK else 10
LONGEST = 1.0 if SOAK else 10.0  # seconds without a greeting, on a machine that does other things meanwhile
EVERY_COMMAND_READ = {"stages": [{"splice": {"handoff": "never"}}]}
HANDED_OFF = {"stages": ["splice"]}


async def reload_every_second(running: Service) -> None:
    """Until cancelled."""
    while True:
        await asyncio.sleep(1)  # the load's own rhythm
        running.signal(signal.SIGHUP)


async def smtp_sources(port: int, round: int) -> Counter[bytes]:
    """Four times ROUND messages; what has to come of them.

    A quarter goes over long sessions: where the gateway reads the commands, it says 421 between two messages at a
    reload (RFC 5321 3.8), and the client begins another session (`-d -A`).
    """
    names = [f"{word}{round}" for word in ("x", "y", "z", "long")]
    *short, (status, said) = await asyncio.gather(
        *(smtp_source(port, name, ROUND, 15) for name in names[:3]),
        smtp_source(port, names[3], ROUND, 10, "-d", "-A"),
    )
    assert short == [(0, "")] * 3
    assert status == 0 and all("421 4.3.2" in line for line in said.splitlines()), said
    sent = [ROUND, ROUND, ROUND, ROUND - len(said.splitlines())]
    return Counter(
        b"%d%b@local.test" % (n, name.encode()) for name, c in zip(names, sent, strict=True) for n in range(1, c + 1)
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stages", [EVERY_COMMAND_READ, HANDED_OFF], ids=["envelope", "opaque"])
async def test_reloads_under_load_lose_and_double_nothing(tmp_path: Path, stages: dict[str, object]) -> None:
    """Each message is sent once and comes once, and each session is served."""
    sent: Counter[bytes] = Counter()
    async with CountingSink(tmp_path) as sink:
        async with service(tmp_path, {**stages, "upstreams": sink.pool()}, workers=2, drain="60s") as running:
            reloading = asyncio.create_task(reload_every_second(running))
            for round in itertools.count():
                sent += await smtp_sources(running.port, round)
                if sum(sent.values()) >= MESSAGES and len(running.all("reload")) >= 3:
                    break
            reloading.cancel()
            await running.until(lambda: len(running.all("generation_ended")) >= len(running.all("reload")))
        assert not running.all("reload_failed")
        reloads = len(running.all("reload"))
    assert sink.taken == sent
    print(f"{sum(sent.values())} messages over {reloads} reloads: no session refused, 0 lost, 0 doubled")


async def kill_every_second(running: Service, times: int) -> None:
    """A random worker, that often."""
    chance = random.Random(times)
    for _ in range(times):
        await asyncio.sleep(1)  # the load's own rhythm
        os.kill(chance.choice(running.workers()), signal.SIGKILL)
    await running.record("worker_died", times)


@pytest.mark.timeout(300)
async def test_killed_workers_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """And there is always somebody who greets within a second (with GATEWAY_SOAK=1, on a machine that is quiet)."""
    async with CountingSink(tmp_path) as sink:
        pipeline = {**EVERY_COMMAND_READ, "upstreams": sink.pool()}
        async with service(tmp_path, pipeline, workers=2, admin="off") as running:
            senders = Senders(running.port)
            with Prober(running.port) as prober:
                sending = asyncio.create_task(senders.send(30))
                await kill_every_second(running, KILLS)
                senders.stop()
                await sending
    acknowledged, dropped = senders.of("acknowledged"), senders.of("dropped")
    assert len(acknowledged) > 100 * KILLS and acknowledged <= sink.taken.keys()
    assert not senders.replies and 0 < len(dropped) <= 30 * KILLS
    assert not sink.twice()
    print(f"{len(acknowledged)} messages acknowledged while {KILLS} workers were killed, 0 of them lost, 0 doubled; "
          f"{len(dropped)} connections dropped; longest time without a greeting {prober.longest:.2f} s")  # fmt: skip
    assert prober.longest < LONGEST, (prober.longest, prober.failures)


def seconds_of_cpu(running: Service) -> list[float]:
    """What each worker and the admin process has used."""
    used = [psutil.Process(pid).cpu_times() for pid in running.workers()]
    return [times.user + times.system for times in used]


async def rests(running: Service) -> None:
    """Nothing is to be done, and nothing is done: a loop that turned in vain would use up its processor."""
    before = seconds_of_cpu(running)
    await asyncio.sleep(1)  # what is measured is a second of rest
    used = [after - earlier for earlier, after in zip(before, seconds_of_cpu(running), strict=True)]
    assert max(used) < 0.25, used


@pytest.mark.timeout(300)
async def test_ten_thousand_idle_clients_hinder_nobody(tmp_path: Path) -> None:
    """Or as many as the machine's limit of descriptors carries in one process, 2 workers, and 200 who send."""
    count = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] * 3 // 4)
    async with CountingSink(tmp_path) as sink:
        pipeline = {**EVERY_COMMAND_READ, "upstreams": sink.pool(), "limits": {"sessions": 20_000}}
        async with service(tmp_path, pipeline, workers=2) as running, Crowd(running.port) as crowd:
            assert await crowd.order("come", count) == {"greeted": count}
            await rests(running)
            senders = Senders(running.port, 2_000)
            await senders.send(200)
            assert len(senders.of("acknowledged")) == 2_000
            assert await crowd.order("ask") == {"250": count}
    assert len(sink.taken) == 2_000 and not sink.twice()
    print(f"{count} idle clients of 2 workers, 200 active ones: 2000 messages, all acknowledged, no idle client lost")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_clients_beyond_the_descriptors_are_refused(tmp_path: Path, loop: str) -> None:
    """They get 421; those who are in go on, and when some leave others may come."""
    few = ["/bin/bash", "-c", 'ulimit -n 512 && exec "$0" "$@"', *GATEWAY]
    async with CountingSink(tmp_path) as sink:
        pipeline = {**EVERY_COMMAND_READ, "upstreams": sink.pool()}
        async with (
            service(tmp_path, pipeline, "--loop", loop, command=few, workers=2) as running,
            Crowd(running.port) as crowd,
        ):
            came = await crowd.order("come", 1200)
            assert came.keys() == {"greeted", "421"} and 300 < came["greeted"] < 1000, came
            await rests(running)
            assert await crowd.order("ask") == {"250": came["greeted"]}
            assert await crowd.order("mail", 50) == {"250": 50}
            all_at_once = await crowd.order("mail", came["greeted"])  # more upstreams than descriptors
            assert all_at_once.keys() == {"250", "451"}, all_at_once
            assert await crowd.order("mail", 50) == {"250": 50}  # nobody took the upstream for dead
            refused = await crowd.order("come", 50)
            assert refused["421"], refused
            short = running.all("descriptors_short")
            assert short and short[0]["limit"] == 512 and len(short) < 20
            assert await crowd.order("leave", 200) == {"221": 200}
            assert (await crowd.order("come", 100))["greeted"] > 0
    assert sum(sink.taken.values()) == 100 + all_at_once["250"]
    print(f"{loop}, 512 descriptors a worker, 1200 clients: {came['greeted']} greeted, {came['421']} got 421")
