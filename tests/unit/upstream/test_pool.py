from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from gateway.protocol.smtp import Ehlo
from gateway.session import Session, Transaction
from gateway.upstream.pool import Pool, PoolBusy, PoolDown, Pools, PoolSettings
from gateway.upstream.profile import ProfileStore, parse_keywords, shared_keywords

pytestmark = pytest.mark.anyio

NewSession = Callable[..., Session]
A, B, C = ("smtp://10.0.0.1:25", "smtp://10.0.0.2:25", "smtp://10.0.0.3:25")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pool_of(*servers: str | tuple[str, int], clock: Clock | None = None, **settings: object) -> Pool:
    listed = tuple(one if isinstance(one, tuple) else (one, 1) for one in servers)
    return Pool("mta", PoolSettings(servers=listed, **settings), clock=clock or Clock())  # type: ignore[arg-type]


async def shares(pool: Pool, sessions: list[Session]) -> Counter[str]:
    return Counter([(await pool.acquire(session)).url for session in sessions])


async def test_round_robin_follows_weights_without_bursts(new_session: NewSession) -> None:
    pool = pool_of((A, 3), (B, 1))
    taken = [(await pool.acquire(new_session())).url for _ in range(8)]
    assert taken == [A, A, B, A] * 2


async def test_least_connections_counts_per_weight(new_session: NewSession) -> None:
    pool = pool_of((A, 1), (B, 2), balance="least_connections")
    assert await shares(pool, [new_session()] * 9) == {A: 3, B: 6}
    for server in pool.servers:
        if server.url == A:
            for _ in range(3):
                pool.release(server)
    assert (await pool.acquire(new_session())).url == A


@pytest.mark.parametrize("balance", ["client", "user", "domain"])
async def test_hashes_stay_with_a_server_and_only_those_of_a_lost_one_move(
    balance: str, new_session: NewSession
) -> None:
    pool = pool_of(A, B, C, balance=balance, max_connections=10_000)
    sessions = [new_session(f"192.0.{n % 256}.{n // 256}", f"u{n}@d{n}.example") for n in range(600)]
    before = [(await pool.acquire(one)).url for one in sessions]
    assert before == [(await pool.acquire(one)).url for one in sessions]
    assert all(count > 140 for count in Counter(before).values())
    pool.failed(pool.servers[0], "down")
    after = [(await pool.acquire(one)).url for one in sessions]
    assert all(old == new for old, new in zip(before, after, strict=True) if old != A)
    assert A not in after


async def test_hash_keys_fall_back_to_sender_domain_and_client(new_session: NewSession) -> None:
    pool = pool_of(A, B, C, balance="domain", max_connections=10_000)
    one, other = new_session("192.0.2.1"), new_session("192.0.2.2")
    one.transaction = other.transaction = Transaction("t", "a@sender.example", ())
    assert (await pool.acquire(one)) is (await pool.acquire(other))
    spread = await shares(pool, [new_session(f"192.0.2.{n}") for n in range(50)])
    assert len(spread) == 3


async def test_full_servers_are_passed_over_then_sessions_wait_in_line(new_session: NewSession) -> None:
    pool = pool_of(A, B, max_connections=1, queue=2)
    servers = [await pool.acquire(new_session()) for _ in range(2)]
    assert {server.url for server in servers} == {A, B}
    first, second = (asyncio.ensure_future(pool.acquire(new_session())) for _ in range(2))
    await asyncio.sleep(0)
    with pytest.raises(PoolBusy, match="2 sessions wait"):
        await pool.acquire(new_session())
    pool.release(servers[1])
    assert (await first) is servers[1]
    assert not second.done()
    pool.release(servers[0])
    assert (await second) is servers[0]
    assert [server.active for server in pool.servers] == [1, 1]


async def test_waiting_ends(new_session: NewSession) -> None:
    pool = pool_of(A, max_connections=1, queue_timeout=0.001)
    server = await pool.acquire(new_session())
    with pytest.raises(PoolBusy, match="became free"):
        await pool.acquire(new_session())
    pool.release(server)
    assert (await pool.acquire(new_session())) is server


async def test_a_session_that_ends_in_line_leaves_its_place(new_session: NewSession) -> None:
    pool = pool_of(A, max_connections=1)
    server = await pool.acquire(new_session())
    waiting = asyncio.ensure_future(pool.acquire(new_session()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    served = asyncio.ensure_future(pool.acquire(new_session()))
    await asyncio.sleep(0)
    pool.release(server)  # the place is given to `served` ...
    served.cancel()  # ... in the turn in which it ends
    with pytest.raises(asyncio.CancelledError):
        await served
    assert server.active == 0
    assert (await asyncio.wait_for(pool.acquire(new_session()), 1)) is server


async def test_who_tried_a_server_is_not_given_it_while_others_in_line_are(new_session: NewSession) -> None:
    pool = pool_of(A, B, max_connections=1)
    a, b = await pool.acquire(new_session()), await pool.acquire(new_session())
    picky = asyncio.ensure_future(pool.acquire(new_session(), {a}))
    easy = asyncio.ensure_future(pool.acquire(new_session()))
    await asyncio.sleep(0)
    pool.release(a)
    assert (await easy) is a
    pool.release(b)
    assert (await picky) is b
    with pytest.raises(PoolDown, match="every server was tried"):
        await pool.acquire(new_session(), {a, b})


async def test_ejection_grows_and_never_takes_more_than_half(new_session: NewSession) -> None:
    clock = Clock()
    pool = pool_of(A, B, C, clock=clock)
    a, b, _ = pool.servers
    lengths = []
    for _ in range(8):
        pool.failed(a, "connection refused")
        lengths.append(a.ejected_until - clock.now)
        clock.now = a.ejected_until
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60]
    pool.failed(a, "x")
    pool.failed(a, "one of many sessions that began before")
    assert a.failures == 9
    pool.failed(b, "x")
    assert b.available(clock.now), "one of three is the half"
    assert a.url not in await shares(pool, [new_session()] * 10)
    pool.succeeded(a)
    assert a.available(clock.now) and a.failures == 0


async def test_the_only_server_is_never_ejected_and_rests_a_second_after_silence(new_session: NewSession) -> None:
    clock = Clock()
    pool = pool_of(A, clock=clock)
    (server,) = pool.servers
    pool.failed(server, "connection refused")
    assert (await pool.acquire(new_session())) is server
    pool.failed(server, "no connection within 10s", slow=True)
    with pytest.raises(PoolDown, match="no connection within 10s"):
        await pool.acquire(new_session())
    clock.now += 1.0
    assert (await pool.acquire(new_session())) is server


async def test_a_server_that_returns_gets_its_share_slowly(new_session: NewSession) -> None:
    clock = Clock()
    pool = pool_of(A, B, clock=clock, max_connections=10_000)
    pool.failed(pool.servers[0], "x")
    clock.now = pool.servers[0].ejected_until + 3.0
    assert (await shares(pool, [new_session()] * 110))[A] == 10
    clock.now += 27.0
    assert (await shares(pool, [new_session()] * 100))[A] == pytest.approx(50, abs=2)


async def test_the_health_check_may_take_all_out_and_waiting_sessions_hear_of_it(new_session: NewSession) -> None:
    clock = Clock()
    pool = pool_of(A, clock=clock, max_connections=1)
    server = await pool.acquire(new_session())
    waiting = asyncio.ensure_future(pool.acquire(new_session()))
    await asyncio.sleep(0)
    pool.probed(server, "connection refused")
    with pytest.raises(PoolDown, match="connection refused"):
        await waiting
    with pytest.raises(PoolDown):
        await pool.acquire(new_session())
    pool.release(server)
    pool.probed(server, "")
    assert (await pool.acquire(new_session())) is server


def ehlo(*lines: str) -> Ehlo:
    pairs = (line.partition(" ") for line in lines)
    return Ehlo("mx", {keyword: parameters for keyword, _, parameters in pairs})


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (["PIPELINING", "DSN"], ["PIPELINING", "SMTPUTF8"], {"PIPELINING": ""}),
        (["SIZE 100"], ["SIZE 50"], {"SIZE": "50"}),
        (["SIZE 0"], ["SIZE 50"], {"SIZE": "50"}),
        (["SIZE"], ["SIZE 0"], {"SIZE": ""}),
        (["SIZE 100"], [], {}),
        (["AUTH PLAIN LOGIN"], ["AUTH login XOAUTH2"], {"AUTH": "LOGIN"}),
        (["AUTH PLAIN"], ["AUTH LOGIN"], {}),
        (["LIMITS RCPTMAX=100 MAILMAX=5"], ["LIMITS RCPTMAX=20"], {"LIMITS": "RCPTMAX=20 MAILMAX=5"}),
        (["LIMITS RCPTMAX=100"], [], {"LIMITS": "RCPTMAX=100"}),
        (["XCLIENT NAME ADDR PORT"], ["XCLIENT ADDR LOGIN NAME"], {"XCLIENT": "NAME ADDR"}),
    ],
)
async def test_the_profile_is_what_all_servers_carry(
    one: list[str], other: list[str], shared: dict[str, str]
) -> None:
    pool = pool_of(A, B)
    assert pool.profile() is None
    pool.learned(pool.servers[0], ehlo(*one))
    assert (pool.profile() or {}).keys() == ehlo(*one).keywords.keys()
    pool.learned(pool.servers[1], ehlo(*other))
    assert pool.profile() == shared


async def test_an_assumed_profile_stands_whatever_servers_say() -> None:
    pool = pool_of(A, assume=("size 10000000", "8BITMIME"))
    expected = {"SIZE": "10000000", "8BITMIME": ""}
    assert pool.profile() == expected
    pool.learned(pool.servers[0], ehlo("DSN"))
    assert pool.profile() == expected


async def test_profiles_outlive_a_restart(tmp_path: object) -> None:
    path = tmp_path / "state" / "profiles.json"  # type: ignore[operator]
    store = ProfileStore(path)
    pool = Pool("mta", PoolSettings(servers=((A, 1), (B, 1))), store=store)
    pool.learned(pool.servers[0], ehlo("SIZE 100", "DSN"))
    again = Pool("mta", PoolSettings(servers=((A, 1), (B, 1))), store=ProfileStore(path))
    assert again.profile() == {"SIZE": "100", "DSN": ""}
    again.learned(again.servers[1], ehlo("SIZE 50"))
    assert again.profile() == {"SIZE": "50"}
    assert [entry.name for entry in path.parent.iterdir()] == ["profiles.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "\udcff"])
async def test_a_broken_profile_file_is_no_profile(content: str, tmp_path: object) -> None:
    path = tmp_path / "profiles.json"  # type: ignore[operator]
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    store = ProfileStore(path)
    assert store.get("a") is None
    store.put("a", {"DSN": ""})
    assert ProfileStore(path).get("a") == {"DSN": ""}


async def test_a_profile_that_cannot_be_written_still_counts(tmp_path: object) -> None:
    (tmp_path / "file").write_text("")  # type: ignore[operator]
    store = ProfileStore(tmp_path / "file" / "profiles.json")  # type: ignore[operator]
    store.put(A, {"DSN": ""})
    assert store.get(A) == {"DSN": ""}


async def test_pools_of_one_are_made_once_and_forgotten_when_unused(
    monkeypatch: pytest.MonkeyPatch, new_session: NewSession
) -> None:
    monkeypatch.setattr("gateway.upstream.pool.DYNAMIC_POOLS", 2)
    pools = Pools({"mta": pool_of(A, tls="required")})
    assert pools.get("mta") is pools["mta"] and pools.get("none") is None
    first = pools.server("10.9.9.9:25")
    assert pools.server("10.9.9.9:25") is first
    await first.acquire(new_session())
    second = pools.server(B)
    pools.server(C)
    assert pools.server("10.9.9.9:25") is first, "it is in use"
    assert pools.server(B) is not second
    with pytest.raises(ValueError):
        pools.server("nonsense://x")


async def test_a_named_server_keeps_the_settings_of_the_pool_that_lists_it() -> None:
    pools = Pools({"mta": pool_of(A, B, tls="required", max_connections=7)}, dynamic=PoolSettings(tls="off"))
    dynamic = pools.server("10.0.0.2:25")
    assert (dynamic.settings.tls, dynamic.settings.max_connections) == ("required", 7)
    assert [server.url for server in dynamic.servers] == [B]
    assert pools.server(C).settings.tls == "off"


async def test_a_bare_address_is_of_the_sessions_protocol() -> None:
    store = Pool("store", PoolSettings(servers=(("imaps://10.0.0.7:993", 1),), max_connections=7))
    pools = Pools({"store": store, "mta": pool_of(A)}, dynamic=PoolSettings(tls="off"))
    for address, protocol, url in (
        ("10.0.0.9:143", "imap", "imap://10.0.0.9:143"),
        ("10.0.0.9:143", "pop3", "pop3://10.0.0.9:143"),
        ("unix:/run/x", "pop3", "pop3+unix:/run/x"),
        ("imap://10.0.0.9", "smtp", "imap://10.0.0.9:143"),
        ("10.0.0.7:993", "imap", "imaps://10.0.0.7:993"),  # as the pool has it: TLS is not lost
        ("10.0.0.7:993", "pop3", "pop3://10.0.0.7:993"),
        ("imap://10.0.0.7:993", "imap", "imap://10.0.0.7:993"),
    ):
        pool = pools.server(address, protocol)
        assert pool.servers[0].url == url and pool is pools.server(address, protocol)
        assert (pool.settings.max_connections == 7) is url.startswith("imaps")


async def test_one_pool_speaks_one_protocol() -> None:
    with pytest.raises(ValueError, match="different protocols"):
        Pool("mixed", PoolSettings(servers=(("imap://a", 1), ("pop3://b", 1))))
    assert Pool("both", PoolSettings(servers=(("imap://a", 1), ("imaps://b", 1)))).protocol == "imap"


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ({"AUTH": "PLAIN LOGIN", "IDLE": ""}, {"AUTH": "login", "ID": ""}, {"AUTH": "LOGIN"}),
        ({"SASL": "PLAIN", "TOP": ""}, {"SASL": "XOAUTH2", "TOP": ""}, {"TOP": ""}),
        ({"SASL": "PLAIN XOAUTH2", "USER": ""}, {"SASL": "XOAUTH2"}, {"SASL": "XOAUTH2"}),
        ({"EXPIRE": "60", "IMPLEMENTATION": "A"}, {"EXPIRE": "60", "IMPLEMENTATION": "B"}, {"EXPIRE": "60"}),
    ],
)
def test_what_stores_share(one: dict[str, str], other: dict[str, str], shared: dict[str, str]) -> None:
    assert shared_keywords([one, other]) == shared


def test_imap_writes_mechanisms_its_own_way() -> None:
    assert parse_keywords(["IMAP4rev1", "AUTH=plain", "auth=LOGIN", "SIZE 10"]) == {
        "IMAP4REV1": "", "AUTH": "PLAIN LOGIN", "SIZE": "10",
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"servers": ()},
        {"servers": (("unix:/run/x", 1),), "tls": "required"},
        {"servers": ((A, 1),), "ca_file": "/nonexistent.pem"},
    ],
)
async def test_settings_that_cannot_work(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Pool("mta", PoolSettings(**settings))  # type: ignore[arg-type]
