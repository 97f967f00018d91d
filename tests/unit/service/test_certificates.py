"""Files that are watched, what is loaded of them, and warnings before certificates expire."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog
import trustme

from gateway.config.models import Pipeline
from gateway.observe import metrics
from gateway.observe.records import undeclared
from gateway.relay import tls_files
from gateway.relay.tls import Certificate, ServerContext
from gateway.service import certificates
from gateway.service.certificates import EXPIRY, PATIENCE, ExpiryWarnings, FileWatch, named_files, set_expiry_gauges

DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def nothing_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_files, "_preloaded", {})


def issue(folder: Path, stem: str, days: float = 60, ca: trustme.CA | None = None) -> Certificate:
    now = datetime.now(UTC)
    issued = (ca or trustme.CA()).issue_cert(f"{stem}.example.org", not_before=now - DAY, not_after=now + days * DAY)
    chain, key = folder / f"{stem}.crt", folder / f"{stem}.key"
    chain.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return Certificate(str(chain), str(key))


def test_the_files_that_pipelines_name(tmp_path: Path) -> None:
    def file(name: str) -> str:
        (tmp_path / name).write_bytes(b"")
        return str(tmp_path / name)

    pair = {"chain": file("mx.crt"), "key": file("mx.key")}
    more = {name: file(name) for name in ("password_file", "client_ca", "trusted_ca", "crl", "dhparam")}
    written: dict[str, object] = {
        "tls": {"certificates": [pair, {**pair, "chain": file("other.crt")}], **more},
        "listen": ["smtp://127.0.0.1:2525", {"url": "smtp://127.0.0.1:2526", "tls": {
            "certificates": [{"chain": file("own.crt"), "key": file("own.key")}]}}],
        "stages": [{"relay": {}}],
    }  # fmt: skip
    pipeline = Pipeline.model_validate(written)
    every = {*pair.values(), *more.values(), *(str(tmp_path / name) for name in ("other.crt", "own.crt", "own.key"))}
    assert named_files([pipeline, pipeline]) == sorted(every)
    unused = {**written, "tls": {"client_ca": more["client_ca"]}, "listen": ["smtp://127.0.0.1:2525"]}
    assert named_files([Pipeline.model_validate(unused)]) == []


# -- watching


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Two files, behind symlinks as certbot makes them."""
    (tmp_path / "live").mkdir()
    for name in ("chain", "key"):
        (tmp_path / f"{name}1").write_bytes(f"{name} 1".encode())
        (tmp_path / "live" / name).symlink_to(f"../{name}1")
    return str(tmp_path / "live" / "chain"), str(tmp_path / "live" / "key")


def turn(path: str, number: int) -> None:
    """Let the symlink lead to another file, as certbot does."""
    link = Path(path)
    (link.parents[1] / f"{link.name}{number}").write_bytes(f"{link.name} {number}".encode())
    link.unlink()
    link.symlink_to(f"../{link.name}{number}")


def rename(path: str, number: int) -> None:
    """Put another file in the place of what the symlink leads to, at once."""
    new = Path(path).parent / "new"
    new.write_bytes(f"{Path(path).name} {number}".encode())
    new.replace(Path(path).resolve())


def write(path: str, number: int) -> None:
    """Write into the file itself."""
    Path(path).write_bytes(f"{Path(path).name} {number}".encode())


@pytest.mark.parametrize("change", [turn, rename, write])
def test_changes_are_reported_once_both_files_rest(pair: tuple[str, str], change: Callable[[str, int], None]) -> None:
    chain, key = pair
    watch = FileWatch(pair)
    assert watch.changed() == {chain: b"chain 1", key: b"key 1"}, "whoever read them earlier may have older ones"
    assert watch.changed() == {}
    for number in (2, 3):
        change(chain, number)
        assert watch.changed() == {}, "the key may follow"
        change(key, number)
        assert watch.changed() == {}
        assert watch.changed() == {chain: f"chain {number}".encode(), key: f"key {number}".encode()}
        assert watch.changed() == {}
    change(key, 4)
    assert (watch.changed(), watch.changed()) == ({}, {key: b"key 4"})


def test_what_changes_nothing_is_not_reported(pair: tuple[str, str]) -> None:
    chain, key = pair
    watch = FileWatch(pair)
    watch.changed()
    write(chain, 1)
    assert [watch.changed() for _ in range(3)] == [{}] * 3, "the same octets"
    os.unlink(chain)
    assert [watch.changed() for _ in range(PATIENCE + 2)] == [{}] * (PATIENCE + 2), "gone"
    write(key, 2)
    assert (watch.changed(), watch.changed()) == ({}, {key: b"key 2"}), "the other one still waits until it rests"
    Path(chain).write_bytes(b"back")
    assert (watch.changed(), watch.changed()) == ({}, {chain: b"back"})


def test_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    watch = FileWatch([str(tmp_path / "pipe"), str(tmp_path), str(tmp_path / "missing")])
    assert watch.changed() == {}


def test_a_file_that_never_rests_holds_nothing_up_for_good(pair: tuple[str, str]) -> None:
    chain, key = pair
    watch = FileWatch(pair)
    watch.changed()
    write(key, 2)
    reports = []
    for number in range(2, PATIENCE + 2):
        write(chain, number)
        reports.append(watch.changed())
    assert [report for report in reports if report] == [{key: b"key 2"}]
    assert watch.changed() == {chain: f"chain {PATIENCE + 1}".encode()}


def test_a_change_while_files_are_read_waits(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    chain, key = pair
    watch = FileWatch(pair)
    watch.changed()
    write(chain, 2)
    assert watch.changed() == {}
    read = certificates._contents

    def slow(path: str) -> bytes | None:
        write(key, 2)
        return read(path)

    monkeypatch.setattr(certificates, "_contents", slow)
    assert watch.changed() == {}
    monkeypatch.undo()
    assert watch.changed() == {chain: b"chain 2", key: b"key 2"}


# -- loading


def test_renewing_says_what_became_of_it(tmp_path: Path) -> None:
    mx, imap = issue(tmp_path, "mx"), issue(tmp_path, "imap")
    contexts = [ServerContext([mx, imap]), ServerContext([imap])]
    watch = FileWatch([mx.chain, mx.key, imap.chain, imap.key])

    def look(quiet: bool = False) -> list[tuple[str, str]]:
        watch.changed()
        with structlog.testing.capture_logs() as records:
            renewed = certificates.renew(contexts, watch.changed(), quiet=quiet)
        assert renewed == {"imap": 2, "mx": 1}.get(changed, 0)
        for record in records:
            known = {key: value for key, value in record.items() if key not in ("event", "log_level")}
            assert undeclared({"record": record["event"], **known}) == []
        return [(record["event"], record["log_level"]) for record in records]

    changed = ""
    assert look() == [], "all of it is loaded already"
    changed = "imap"
    issue(tmp_path, "imap")
    assert look() == [("certificate_renewed", "info")] * 2
    changed = "mx"
    issue(tmp_path, "mx")
    assert look(quiet=True) == []
    changed = "broken"
    Path(imap.key).write_bytes(Path(mx.key).read_bytes())
    assert look() == [("certificate_not_renewed", "error")] * 2
    Path(imap.key).write_bytes(b"")
    assert look(quiet=True) == [("certificate_not_renewed", "debug")] * 2
    assert [facts.names for facts in contexts[0].certificates()] == [("mx.example.org",), ("imap.example.org",)]


# -- expiry


def test_warnings_before_the_end(tmp_path: Path) -> None:
    contexts = [ServerContext([issue(tmp_path, "mx", 30), issue(tmp_path, "later", 300)])] * 2
    end = contexts[0].certificates()[0].not_after
    now = [end]
    warnings = ExpiryWarnings(lambda: now[0])
    said: list[float] = []
    for hours in range(24 * 25, -24 * 2, -1):
        now[0] = end - timedelta(hours=hours)
        with structlog.testing.capture_logs() as records:
            due = warnings.warn(contexts)
        assert [record["certificate"] for record in records] == [facts.chain for facts in due]
        for record in records:
            assert record["event"] == "certificate_expires" and record["names"] == ["mx.example.org"]
            assert record["days"] == hours // 24
            said.append(hours / 24)
    assert said == [*range(21, -2, -1)]
    now[0] = end - timedelta(days=1.5)
    assert [len(ExpiryWarnings(lambda: now[0]).warn(contexts)) for _ in range(2)] == [1, 1]
    steps = ExpiryWarnings(lambda: now[0])
    heard = []
    for days in (7.1, 6.9, 6.8, 3.1, 2.9, 1.1, 0.9, 0.8, -0.05):
        now[0] = end - days * DAY
        heard += [days] * len(steps.warn(contexts))
    assert heard == [7.1, 6.9, 3.1, 2.9, 1.1, 0.9], "a threshold does not wait for the day to be over"


def test_gauges(tmp_path: Path) -> None:
    mx, imap = issue(tmp_path, "mx", 30), issue(tmp_path, "imap", 50)
    contexts = [ServerContext([mx]), ServerContext([mx, imap])]

    def gauges() -> list[int]:
        return [metrics.gauge(EXPIRY, certificate=one.chain).value for one in (mx, imap)]

    set_expiry_gauges(contexts)
    ends = [int(facts.not_after.timestamp()) for facts in contexts[1].certificates()]
    assert gauges() == ends
    issue(tmp_path, "mx", 90)
    files = {path: Path(path).read_bytes() for path in (mx.chain, mx.key)}
    contexts[0].renew(files)
    set_expiry_gauges(contexts)
    assert gauges() == ends, "the other listener still shows the old one"
    set_expiry_gauges(contexts[:1])
    assert gauges()[0] > ends[0] and gauges()[1] == 0
    set_expiry_gauges([])
    assert gauges() == [0, 0]
