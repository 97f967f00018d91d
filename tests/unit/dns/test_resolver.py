"""The resolver against a scripted name server: every kind of answer, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from gateway.dns import resolver as resolver_module
from gateway.dns.resolver import Failed, Found, NotFound, Resolver, Result, ReverseName
from gateway.dns.transport import servers_of, system_servers
from gateway.protocol import dns
from tests.peers.dns import DnsServer, Entry

pytestmark = pytest.mark.anyio

SHORT = 0.2  # seconds for questions that are not going to be answered


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def descriptors() -> int:
    """Open descriptors, once the loop has closed what was closed."""
    for _ in range(5):
        await asyncio.sleep(0)
    return len(os.listdir("/proc/self/fd"))


def texts(result: Result) -> list[str]:
    assert isinstance(result, Found), result
    return [str(record.data) for record in result.records]


async def test_kinds_of_answers() -> None:
    zone: dict[str, Entry] = {
        "ok.test": {"A": ["192.0.2.1", "192.0.2.2"], "ttl": 30},
        "only4.test": {"A": ["192.0.2.1"]},
        "fail.test": {"do": "servfail"},
        "no.test": {"do": "refused"},
    }
    async with DnsServer(zone) as server:
        resolver = Resolver([server.address])
        found = await resolver.query("OK.test.", dns.A)
        assert sorted(texts(found)) == ["192.0.2.1", "192.0.2.2"]
        assert isinstance(found, Found) and found.ttl == 30
        assert await resolver.query("missing.test", dns.A) == NotFound(resolver_module.NEGATIVE_TTL)
        assert await resolver.query("only4.test", dns.AAAA) == NotFound(resolver_module.NEGATIVE_TTL)
        assert await resolver.query("fail.test", dns.A) == Failed("servfail")
        assert await resolver.query("no.test", dns.A) == Failed("refused")
        assert await resolver.query("a" * 64 + ".test", dns.A) == NotFound()
        assert len(set(server.ports)) == len(server.ports) == 5  # one port a question, none for an impossible name


@pytest.mark.parametrize(
    ("what", "reason"),
    [("silent", "timeout"), ("garbage", "garbage"), ("half", "garbage"), ("wrongid", "garbage"),
     ("wrongname", "garbage"), ("torn", "garbage")],
)  # fmt: skip
async def test_no_answer(what: str, reason: resolver_module.Reason) -> None:
    async with DnsServer({"x.test": {"A": ["192.0.2.1"], "do": what}}) as server:
        resolver = Resolver([server.address], timeout=SHORT, attempts=2)
        assert await resolver.query("x.test", dns.A) == Failed(reason)
        assert [transport for *_, transport in server.asked].count("udp") == 2


async def test_nobody_listens() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.bind(("127.0.0.1", 0))
        address = unused.getsockname()
    assert await Resolver([address]).query("x.test", dns.A) == Failed("network")


async def test_only_the_right_answer_counts() -> None:
    async with DnsServer({"x.test": {"A": ["192.0.2.1"], "do": "spoof"}}) as server:
        assert texts(await Resolver([server.address]).query("x.test", dns.A)) == ["192.0.2.1"]


async def test_truncated_answer_is_asked_for_over_tcp() -> None:
    many = [f"192.0.2.{i}" for i in range(200)]
    async with DnsServer({"big.test": {"A": many, "do": "truncate"}}) as server:
        assert len(texts(await Resolver([server.address]).query("big.test", dns.A))) == 200
        assert [transport for *_, transport in server.asked] == ["udp", "tcp"]


@pytest.mark.parametrize("what", ["servfail", "refused", "silent"])
async def test_another_server_is_asked(what: str) -> None:
    async with DnsServer({"x.test": {"do": what}, "y.test": {"do": what}}) as bad, DnsServer(
        {"x.test": {"A": ["192.0.2.1"]}, "y.test": {"A": ["192.0.2.2"]}}
    ) as good:
        resolver = Resolver([bad.address, good.address], timeout=2.0)
        assert texts(await resolver.query("x.test", dns.A)) == ["192.0.2.1"]
        assert texts(await resolver.query("y.test", dns.A)) == ["192.0.2.2"]
        assert (len(bad.asked), len(good.asked)) == (1, 2)  # it is the other one's turn


async def test_servers_are_asked_in_turn() -> None:
    zone: dict[str, Entry] = {f"n{i}.test": {"A": ["192.0.2.1"]} for i in range(9)}
    async with DnsServer(zone) as one, DnsServer(zone) as two, DnsServer(zone) as three:
        resolver = Resolver([one.address, two.address, three.address])
        for name in zone:
            assert texts(await resolver.query(name, dns.A)) == ["192.0.2.1"]
        assert [len(server.asked) for server in (one, two, three)] == [3, 3, 3]


async def test_a_silent_server_rests(clock: Clock) -> None:
    zone: dict[str, Entry] = {f"n{i}.test": {"A": ["192.0.2.1"]} for i in range(9)}
    async with DnsServer({name: {"do": "garbage", "A": ["192.0.2.1"]} for name in zone}) as bad, DnsServer(zone) as good:
        resolver = Resolver([bad.address, good.address], timeout=2 * SHORT, clock=clock)
        for i in range(4):
            assert texts(await resolver.query(f"n{i}.test", dns.A)) == ["192.0.2.1"]
        assert (len(bad.asked), len(good.asked)) == (1, 4)
        clock.now += resolver_module.REST_SECONDS
        for i in range(4, 6):
            await resolver.query(f"n{i}.test", dns.A)
        assert (len(bad.asked), len(good.asked)) == (2, 6)
        bad.zone = zone
        clock.now += resolver_module.REST_SECONDS
        for i in range(6, 9):
            await resolver.query(f"n{i}.test", dns.A)
        assert (len(bad.asked), len(good.asked)) in ((3, 8), (4, 7))  # it answers again, and has its turn


async def test_long_timeouts_have_more_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "RESEND_SECONDS", SHORT / 6)
    async with DnsServer({"x.test": {"do": "silent"}}) as one, DnsServer({"x.test": {"do": "silent"}}) as other:
        resolver = Resolver([one.address, other.address], timeout=SHORT, attempts=1)
        assert await resolver.query("x.test", dns.A) == Failed("timeout")
        assert (len(one.asked), len(other.asked)) == (3, 3)


async def test_worst_failure_is_told() -> None:
    async with DnsServer({"x.test": {"do": "silent"}}) as one, DnsServer({"x.test": {"do": "servfail"}}) as other:
        assert await Resolver([one.address, other.address], timeout=SHORT).query("x.test", dns.A) == Failed("servfail")
        assert (len(one.asked), len(other.asked)) == (2, 1)


# -- cache and single flight ---------------------------------------------------------------------------------


async def test_answers_are_kept_for_their_time(clock: Clock) -> None:
    zone: dict[str, Entry] = {"x.test": {"A": ["192.0.2.1"], "ttl": 20}, "soon.test": {"do": "nxdomain", "negative": 5},
            "late.test": {"negative": 100_000}, "zero.test": {"A": ["192.0.2.1"], "ttl": 0},
            "fail.test": {"do": "servfail"}}  # fmt: skip
    async with DnsServer(zone) as server:
        resolver = Resolver([server.address], clock=clock)

        async def asked(name: str) -> int:
            before = len(server.asked)
            await resolver.query(name, dns.A)
            return len(server.asked) - before

        assert [await asked("x.test"), await asked("X.TEST.")] == [1, 0]
        assert [await asked("missing.test"), await asked("missing.test")] == [1, 0]
        assert [await asked("fail.test"), await asked("fail.test")] == [1, 0]
        assert [await asked("zero.test"), await asked("zero.test")] == [1, 1]
        clock.now += resolver_module.FAILURE_TTL
        assert await asked("fail.test") == 1
        assert [await asked("soon.test"), await asked("late.test")] == [1, 1]
        clock.now += 20 - resolver_module.FAILURE_TTL
        assert [await asked("x.test"), await asked("missing.test")] == [1, 0]
        assert [await asked("soon.test"), await asked("late.test")] == [1, 0]
        clock.now += resolver_module.NEGATIVE_TTL
        assert [await asked("missing.test"), await asked("late.test")] == [1, 0]
        clock.now += resolver_module.MAX_NEGATIVE_TTL
        assert await asked("late.test") == 1


@pytest.mark.parametrize(("valid", "seconds"), [(5.0, 4.0), (1000.0, 999.0)])
async def test_an_answer_is_believed_as_long_as_told(clock: Clock, valid: float, seconds: float) -> None:
    async with DnsServer({"x.test": {"A": ["192.0.2.1"], "ttl": 60}, "no.test": {"negative": 60}}) as server:
        resolver = Resolver([server.address], valid=valid, clock=clock)
        for name in ("x.test", "no.test"):
            found = await resolver.query(name, dns.A)
            assert not isinstance(found, Failed) and found.ttl == valid
        clock.now += seconds
        await asyncio.gather(resolver.query("x.test", dns.A), resolver.query("no.test", dns.A))
        assert len(server.asked) == 2
        clock.now += 1.0
        await asyncio.gather(resolver.query("x.test", dns.A), resolver.query("no.test", dns.A))
        assert len(server.asked) == 4


async def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "CACHE_ENTRIES", 10)
    async with DnsServer() as server:
        resolver = Resolver([server.address])
        for i in range(50):
            await resolver.query(f"n{i}.test", dns.A)
        assert len(resolver._cache) <= 10


async def test_the_same_is_asked_once() -> None:
    async with DnsServer({"x.test": {"A": ["192.0.2.1"], "do": "hold", "ttl": 0}}) as server:
        resolver = Resolver([server.address])
        tasks = [asyncio.create_task(resolver.query("x.test", dns.A)) for _ in range(20)]
        await server.wait_asked(1)
        server.release()
        results = await asyncio.gather(*tasks)
        assert len(server.asked) == 1 and all(texts(result) == ["192.0.2.1"] for result in results)


async def test_cancelled_question_leaves_nothing_and_others_go_on() -> None:
    async with DnsServer({"x.test": {"A": ["192.0.2.1"], "do": "hold"}}) as server:
        resolver = Resolver([server.address])
        first, second, third = [asyncio.create_task(resolver.query("x.test", dns.A)) for _ in range(3)]
        await server.wait_asked(1)
        before = asyncio.all_tasks()
        open_before = await descriptors()
        second.cancel()
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled() and second.cancelled()
        await server.wait_asked(2)  # the third asks for itself now
        assert await descriptors() == open_before
        assert asyncio.all_tasks() - before <= server._tasks
        server.release()
        assert texts(await third) == ["192.0.2.1"]
        assert not resolver._flights and not resolver._running
    third.result()


async def test_nothing_is_left_after_any_kind_of_answer() -> None:
    kinds = ("answer", "nxdomain", "servfail", "silent", "garbage", "wrongid", "truncate", "torn", "spoof")
    async with DnsServer({f"{kind}.test": {"A": ["192.0.2.1"], "do": kind} for kind in kinds}) as server:
        resolver = Resolver([server.address], timeout=SHORT)
        await resolver.query("truncate.test", dns.AAAA)  # what the server and the loop open once
        open_before, tasks = await descriptors(), asyncio.all_tasks()
        for kind in kinds:
            await resolver.query(f"{kind}.test", dns.A)
        await asyncio.gather(*server._tasks)
        assert await descriptors() == open_before
        assert asyncio.all_tasks() == tasks


async def test_cancelled_over_tcp() -> None:
    async with DnsServer({"x.test": {"do": "truncate"}}) as server:
        server.zone = {"x.test": {"do": "truncate"}}
        resolver = Resolver([server.address])
        task = asyncio.create_task(resolver.query("x.test", dns.A))
        await server.wait_asked(1)
        server.zone["x.test"] = {"do": "silent"}
        await server.wait_asked(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_close_ends_what_is_under_way() -> None:
    async with DnsServer({"x.test": {"do": "silent"}}) as server:
        resolver = Resolver([server.address], timeout=60)
        task = asyncio.create_task(resolver.query("x.test", dns.A))
        await server.wait_asked(1)
        resolver.close()
        resolver.close()
        assert await task == Failed("network")
        assert await resolver.query("y.test", dns.A) == Failed("network")
        assert len(server.asked) == 1


async def test_questions_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "MAX_QUESTIONS", 2)
    async with DnsServer({f"x{i}.test": {"do": "hold", "A": ["192.0.2.1"]} for i in range(4)}) as server:
        resolver = Resolver([server.address])
        tasks = [asyncio.create_task(resolver.query(f"x{i}.test", dns.A)) for i in range(4)]
        await server.wait_asked(2)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(server.asked) == 2
        server.release()
        assert all(texts(result) for result in await asyncio.gather(*tasks))


# -- aliases, addresses, reverse -----------------------------------------------------------------------------


async def test_aliases_in_the_answer_and_beyond(clock: Clock) -> None:
    zone: dict[str, Entry] = {
        "a.test": {"CNAME": ["b.test."], "ttl": 50},
        "b.test": {"CNAME": ["c.test."], "ttl": 10, "bare": True},
        "c.test": {"CNAME": ["D.test."]},
        "d.test": {"A": ["192.0.2.1"]},
        "dangling.test": {"CNAME": ["missing.test."]},
        "empty.test": {"CNAME": ["d.test."]},
        "loop.test": {"CNAME": ["pool.test."], "bare": True},
        "pool.test": {"CNAME": ["loop.test."], "bare": True},
        "self.test": {"CNAME": ["self.test."]},
    }
    async with DnsServer(zone) as server:
        resolver = Resolver([server.address], clock=clock)
        result = await resolver.query("a.test", dns.A)
        assert texts(result) == ["192.0.2.1"] and isinstance(result, Found) and result.ttl == 10
        assert [name for name, *_ in server.asked] == ["a.test", "c.test"]
        assert await resolver.query("dangling.test", dns.A) == NotFound(resolver_module.NEGATIVE_TTL)
        assert await resolver.query("empty.test", dns.TXT) == NotFound(resolver_module.NEGATIVE_TTL)
        assert isinstance(await resolver.query("loop.test", dns.A), Failed)
        assert isinstance(await resolver.query("self.test", dns.A), (Failed, NotFound))


@pytest.mark.parametrize(("links", "found"), [(8, True), (9, False)])
async def test_chains_are_bounded(links: int, found: bool) -> None:
    zone = {f"n{i}.test": {"CNAME": [f"n{i + 1}.test."], "bare": True} for i in range(links)}
    async with DnsServer({**zone, f"n{links}.test": {"A": ["192.0.2.1"]}}) as server:
        assert isinstance(await Resolver([server.address]).query("n0.test", dns.A), Found if found else Failed)


async def test_addresses() -> None:
    zone: dict[str, Entry] = {
        "both.test": {"A": ["192.0.2.1"], "AAAA": ["2001:db8::1"]},
        "four.test": {"A": ["192.0.2.1"]},
        "none.test": {"MX": ["10 x."]},
        "fail.test": {"do": "servfail"},
    }
    async with DnsServer(zone) as server:
        resolver = Resolver([server.address])
        assert texts(await resolver.addresses("both.test")) == ["192.0.2.1", "2001:db8::1"]
        assert texts(await resolver.addresses("four.test")) == ["192.0.2.1"]
        assert await resolver.addresses("none.test") == NotFound(resolver_module.NEGATIVE_TTL)
        assert await resolver.addresses("fail.test") == Failed("servfail")


async def test_addresses_of_one_family() -> None:
    async with DnsServer({"both.test": {"A": ["192.0.2.1"], "AAAA": ["2001:db8::1"]}}) as server:
        assert texts(await Resolver([server.address], ipv4=False).addresses("both.test")) == ["2001:db8::1"]
        assert texts(await Resolver([server.address], ipv6=False).addresses("both.test")) == ["192.0.2.1"]
        assert [qtype for _, qtype, _ in server.asked] == ["AAAA", "A"]


R = "2.0.192.in-addr.arpa"
P7 = {f"7.{R}": {"PTR": ["h.test."]}}
OK = ("h.test", "h.test", "ok")
V6 = "7.0.0.0" + ".0" * 20 + ".8.b.d.0.1.0.0.2.ip6.arpa"


@pytest.mark.parametrize(
    ("address", "zone", "expected"),
    [
        ("192.0.2.7", {**P7, "h.test": {"A": ["192.0.2.9", "192.0.2.7"]}}, OK),
        ("::ffff:192.0.2.7", {**P7, "h.test": {"A": ["192.0.2.7"]}}, OK),
        ("2001:db8::7", {V6: {"PTR": ["h.test."]}, "h.test": {"AAAA": ["2001:DB8:0::7"]}}, OK),
        # the delegation of a small network
        ("192.0.2.7", {f"7.{R}": {"CNAME": [f"7.0-15.{R}."], "bare": True}, f"7.0-15.{R}": {"PTR": ["h.test."]},
                       "h.test": {"CNAME": ["g.test."]}, "g.test": {"A": ["192.0.2.7"]}}, OK),
        ("192.0.2.7", {}, (None, None, "unavailable")),
        ("192.0.2.7", {f"7.{R}": {"TXT": ["x"]}}, (None, None, "unavailable")),
        ("192.0.2.7", P7, (None, "h.test", "unavailable")),
        ("192.0.2.7", {**P7, "h.test": {"A": ["192.0.2.8"]}}, (None, "h.test", "unavailable")),
        ("192.0.2.7", {f"7.{R}": {"do": "servfail"}}, (None, None, "tempunavail")),
        ("192.0.2.7", {f"7.{R}": {"do": "silent"}}, (None, None, "tempunavail")),
        ("192.0.2.7", {**P7, "h.test": {"do": "servfail"}}, (None, "h.test", "tempunavail")),
        # names that could not stand in a log or a command
        ("192.0.2.7", {f"7.{R}": {"PTR": ["a\\032b.test."]}}, (None, None, "tempunavail")),
        ("192.0.2.7", {f"7.{R}": {"PTR": ["a\\013\\010b.test."]}}, (None, None, "tempunavail")),
        ("192.0.2.7", {f"7.{R}": {"PTR": ["under_score.test."]}}, (None, None, "tempunavail")),
        ("192.0.2.7", {f"7.{R}": {"PTR": ["."]}}, (None, None, "tempunavail")),
        ("unix:", {}, (None, None, "tempunavail")),
        ("", {}, (None, None, "tempunavail")),
    ],
)  # fmt: skip
async def test_forward_confirmed(
    address: str, zone: dict[str, Entry], expected: tuple[str | None, str | None, str]
) -> None:
    async with DnsServer(zone) as server:
        silent = any(entry.get("do") == "silent" for entry in zone.values())
        resolver = Resolver([server.address], timeout=SHORT if silent else 5.0)
        assert await resolver.forward_confirmed(address) == ReverseName(*expected)  # type: ignore[arg-type]


async def test_forward_confirmed_without_the_family() -> None:
    async with DnsServer({**P7, "h.test": {"A": ["192.0.2.7"]}}) as server:
        found = await Resolver([server.address], ipv4=False).forward_confirmed("192.0.2.7")
        assert found == ReverseName(None, "h.test", "unavailable")
        assert [qtype for _, qtype, _ in server.asked] == ["PTR"]


async def test_a_few_names_of_many_are_tried() -> None:
    names = [f"n{i}.test" for i in range(50)]
    zone: dict[str, Entry] = {f"7.{R}": {"PTR": [f"{name}." for name in names]}}
    async with DnsServer(zone) as server:
        result = await Resolver([server.address]).forward_confirmed("192.0.2.7")
        assert result.name is None and result.unverified in names and result.status == "unavailable"
        assert len(server.asked) == 1 + resolver_module.MAX_NAMES
        tried = [name for name, *_ in server.asked[1:]]
        server.zone[tried[2]] = {"A": ["192.0.2.7"]}
        again = await Resolver([server.address]).forward_confirmed("192.0.2.7")
        assert again.status == "unavailable" or again.name == tried[2]


# -- name servers of the machine -----------------------------------------------------------------------------


async def test_resolv_conf(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(
        "# nameserver 192.0.2.99\nsearch test\nnameserver 192.0.2.1 \nnameserver\nnameserver bad\n"
        "nameserver ::1\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n"
    )
    assert [server.address[0] for server in system_servers(path)] == ["192.0.2.1", "::1", "192.0.2.3"]
    assert [server.address for server in system_servers(tmp_path / "none")] == [("127.0.0.1", 53)]


@pytest.mark.parametrize("address", [("ns.test", 53), ("192.0.2.1", -1), ("192.0.2.1", 70000)])
async def test_bad_server_address(address: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="name server"):
        servers_of([address])
