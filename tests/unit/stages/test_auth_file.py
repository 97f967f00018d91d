from __future__ import annotations

import asyncio
import hmac
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog
from pydantic import ValidationError

from gateway import Authenticated, Cause, Certificate, Digest, Listener, Password, Refuse, Session, passwords
from gateway.passwords import StoredPassword, hash_password
from stages import auth_file
from stages.auth_file import AuthFile, AuthFileSettings


def make_hashes() -> dict[str, str]:
    """Cheap hashes of "demo" in every form."""
    from passlib import hash as verifiers

    bcrypt = str(verifiers.bcrypt.using(rounds=4).hash("demo"))
    sha512 = str(verifiers.sha512_crypt.using(rounds=1000).hash("demo"))
    return {
        "bcrypt": bcrypt,
        "htpasswd": bcrypt.replace("$2b$", "$2y$"),
        "argon2": str(verifiers.argon2.using(time_cost=1, memory_cost=64).hash("demo")),
        "sha512": sha512,
        "sha256": str(verifiers.sha256_crypt.using(rounds=1000).hash("demo")),
        "md5": str(verifiers.md5_crypt.hash("demo")),
        "apr1": str(verifiers.apr_md5_crypt.hash("demo")),
        "ssha": str(verifiers.ldap_salted_sha1.hash("demo")),
        "ssha512": str(verifiers.ldap_salted_sha512.hash("demo")),
        "sha": str(verifiers.ldap_sha1.hash("demo")),
        "plain": "{PLAIN}demo",
        "clear": "{cleartext}demo",
        "dovecot": "{SHA512-CRYPT}" + sha512 + ":1000:1000::/home/x",
        "blf": "{blf-crypt}" + bcrypt,
    }


def make_session() -> Session:
    return Session("ID", "p", Listener("smtp://198.51.100.25:25"), ("192.0.2.7", 1), ("198.51.100.25", 25), 0.0)


@asynccontextmanager
async def started(path: Path, text: str, **settings: object) -> AsyncIterator[AuthFile]:
    path.write_text(text)
    stage = AuthFile(AuthFileSettings.model_validate({"file": str(path), **settings}))
    stage.id = "auth_file"
    loop = asyncio.get_running_loop()
    await stage.start(SimpleNamespace(loop=loop, clock=loop.time, log=structlog.get_logger()))
    try:
        yield stage
    finally:
        await stage.stop()


async def login(stage: AuthFile, user: str, password: str, authzid: str = "") -> object:
    given = Password(authzid, user, password, "PLAIN")
    return await stage.auth(make_session(), SimpleNamespace(credentials=given, number=1))


def failed(verdict: object) -> bool:
    return isinstance(verdict, Refuse) and verdict.cause is Cause.AUTH_FAILED


@pytest.mark.anyio
async def test_every_form(tmp_path: Path) -> None:
    hashes = make_hashes()
    text = "# users\n\n" + "".join(f"{name}@example.org:{value}\r\n" for name, value in hashes.items())
    async with started(tmp_path / "users", text) as stage:
        for name in hashes:
            user = f"{name}@example.org"
            assert await login(stage, user, "demo") == Authenticated(user, password="demo"), name
            for wrong in ("Demo", "demo ", "d\0", "x" * 5000):
                assert failed(await login(stage, user, wrong)), (name, wrong)


@pytest.mark.anyio
async def test_users(tmp_path: Path) -> None:
    async with started(tmp_path / "users", "Alice@Example.org:{PLAIN}demo\n") as stage:
        assert await login(stage, "alice@example.ORG", "demo") == Authenticated("alice@example.ORG", password="demo")
        assert failed(await login(stage, "bob@example.org", "demo"))
        assert failed(await login(stage, "alice@example.org", "demo", authzid="bob@example.org"))
        assert not failed(await login(stage, "alice@example.org", "demo", authzid="Alice@example.org"))
        attempt = SimpleNamespace(credentials=Certificate("alice@example.org"), number=1)
        assert await stage.auth(make_session(), attempt) is None
        assert stage.mechanisms(make_session()) == ("PLAIN", "LOGIN")


@pytest.mark.anyio
async def test_unknown_users_cost_a_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"a:{{PLAIN}}x\nb:{make_hashes()['bcrypt']}\nc:{make_hashes()['bcrypt']}\n"
    async with started(tmp_path / "users", text) as stage:
        seen: list[str] = []
        real = passwords.verify_password

        def verify(entry: StoredPassword, password: str) -> bool:
            seen.append(entry.verifier)
            return real(entry, password)

        monkeypatch.setattr(auth_file, "verify_password", verify)
        assert failed(await login(stage, "nobody", "demo"))
        assert seen == ["bcrypt"]


@pytest.mark.anyio
async def test_the_stand_in_is_nobodys_password(tmp_path: Path) -> None:
    async with started(tmp_path / "users", "a:{PLAIN}demo\n") as stage:
        assert failed(await login(stage, "nobody", "demo"))
    async with started(tmp_path / "users", "") as stage:
        assert failed(await login(stage, "nobody", "*"))


@pytest.mark.anyio
async def test_fallthrough(tmp_path: Path) -> None:
    async with started(tmp_path / "users", "a:{PLAIN}demo\n", fallthrough=True) as stage:
        assert await login(stage, "nobody", "demo") is None
        assert failed(await login(stage, "a", "wrong"))


@pytest.mark.anyio
async def test_read_again_when_changed(tmp_path: Path) -> None:
    path = tmp_path / "users"
    async with started(path, "a:{PLAIN}demo\n", cache="30s") as stage:
        assert not failed(await login(stage, "a", "demo"))
        path.write_text("a:{PLAIN}other-password\nb:{PLAIN}new\n")
        assert failed(await login(stage, "a", "demo"))
        assert not failed(await login(stage, "b", "new"))
        with structlog.testing.capture_logs() as logs:
            path.write_text("b:secret-but-no-hash\n")
            assert not failed(await login(stage, "b", "new"))
            assert not failed(await login(stage, "b", "new"))
            path.unlink()
            assert not failed(await login(stage, "b", "new"))
        assert [entry["event"] for entry in logs] == ["users_file", "users_file"]
        assert "secret" not in str(logs) and "line 1" in logs[0]["error"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nohash\n", "line 1: not user:hash"),
        ("a:{PLAIN}x\nA:{PLAIN}y\n", "line 2: a second entry for 'a'"),
        ("\na:topsecret\n", "line 2: the hash of 'a' has no known form"),
        ("a:{PLAIN}\n", "no known form"),
        ("a:\n", "no known form"),
        (":x\n", "not user:hash"),
    ],
)
@pytest.mark.anyio
async def test_a_bad_file_stops_the_start(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error) as raised:
        async with started(tmp_path / "users", text):
            pass
    assert "topsecret" not in str(raised.value)


@pytest.mark.anyio
async def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "users"
    with pytest.raises(ValidationError):
        AuthFileSettings.model_validate({"file": str(path)})
    path.touch()
    stage = AuthFile(AuthFileSettings.model_validate({"file": str(path)}))
    path.unlink()  # gone between check and start
    stage.id = "auth_file"
    with pytest.raises(FileNotFoundError):
        await stage.start(SimpleNamespace(loop=asyncio.get_running_loop(), clock=lambda: 0.0, log=None))
    await stage.stop()


@pytest.mark.anyio
async def test_the_cache_is_for_right_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    verified = 0
    real = passwords.verify_password

    def verify(entry: StoredPassword, password: str) -> bool:
        nonlocal verified
        verified += 1
        return real(entry, password)

    async with started(tmp_path / "users", "a:{PLAIN}demo\n", cache="30s") as stage:
        monkeypatch.setattr(auth_file, "verify_password", verify)
        stage._clock = lambda: now
        for password, expected in (("demo", 1), ("demo", 1), ("wrong", 2), ("wrong", 3), ("demo", 3)):
            assert failed(await login(stage, "a", password)) is (password == "wrong")
            assert verified == expected
        now = 31.0
        await login(stage, "a", "demo")
        assert verified == 4
        assert "demo" not in repr(stage._cache) and "demo" not in repr(stage._users.entries if stage._users else "")


@pytest.mark.anyio
async def test_too_many_verifies_are_454(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    async with started(tmp_path / "users", "a:{PLAIN}demo\n", threads=1, queue=1) as stage:
        monkeypatch.setattr(auth_file, "verify_password", lambda entry, password: gate.wait(10))
        waiting = [asyncio.ensure_future(login(stage, "a", "demo")) for _ in range(2)]
        for _ in range(5):  # turns of the loop: both have stood in line by then
            await asyncio.sleep(0)
        assert stage._pending == 2
        refuse = await login(stage, "a", "demo")
        assert isinstance(refuse, Refuse) and refuse.cause is Cause.AUTH_UNAVAILABLE
        gate.set()
        assert not any(failed(verdict) for verdict in await asyncio.gather(*waiting))
        assert stage._pending == 0


@pytest.mark.anyio
async def test_cram_md5(tmp_path: Path) -> None:
    challenge = b"<42.1700000000@mx.example>"

    async def answer(stage: AuthFile, user: str, password: str) -> object:
        digest = hmac.new(password.encode(), challenge, "md5").hexdigest()
        attempt = SimpleNamespace(credentials=Digest(user, challenge, digest), number=1)
        return await stage.auth(make_session(), attempt)

    text = f"tim:{{PLAIN}}tanstaaf\nbob:{make_hashes()['bcrypt']}\n"
    async with started(tmp_path / "users", text, cram_md5=True) as stage:
        assert stage.mechanisms(make_session()) == ("PLAIN", "LOGIN", "CRAM-MD5")
        assert await answer(stage, "tim", "tanstaaf") == Authenticated("tim", password="tanstaaf")
        assert failed(await answer(stage, "tim", "other"))
        assert failed(await answer(stage, "bob", "demo"))
        assert failed(await answer(stage, "nobody", "*"))
    async with started(tmp_path / "users", f"bob:{make_hashes()['bcrypt']}\n", cram_md5=True) as stage:
        assert "CRAM-MD5" not in stage.mechanisms(make_session())


@pytest.mark.parametrize("scheme", ["bcrypt", "argon2"])
def test_hash_password(scheme: str) -> None:
    entry = passwords.parse_stored(hash_password("pässword", scheme))
    assert (
        entry is not None
        and passwords.verify_password(entry, "pässword")
        and not passwords.verify_password(entry, "password")
    )


def test_hash_password_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(ValueError, match="unknown scheme"):
        hash_password("x", "rot13")
    with pytest.raises(ValueError, match="72 octets"):
        hash_password("x" * 73, "bcrypt")


@pytest.mark.anyio
async def test_threads_end(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    async with started(tmp_path / "users", "a:{PLAIN}demo\n") as stage:
        await login(stage, "a", "demo")
        ours = [one for one in threading.enumerate() if one not in before and one.name.startswith("auth_file")]
        assert ours
    for thread in ours:
        thread.join(10)
    assert not any(thread.is_alive() for thread in ours)
