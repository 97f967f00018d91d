"""Every transcript below this folder, in each way it says it can be played, against a real listener."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.relay.spool import Spool, SpoolSpace
from gateway.testing.dialogue import MODES, Player, Transcript, Upstream, parse
from gateway.testing.gateway import free_port, running
from tests.dialogue.stages import STAGES

FOLDER = Path(__file__).parent
TRANSCRIPTS = [parse(path) for path in sorted(FOLDER.rglob("*.txt"))]
CASES = [
    pytest.param(
        transcript,
        mode,
        id=f"{transcript.path.relative_to(FOLDER).with_suffix('')}-{mode}",
        marks=[pytest.mark.slow] if mode == "bytes" else [],  # every split of the codecs is a unit test already
    )
    for transcript in TRANSCRIPTS
    for mode in transcript.modes
]
EHLO = ["PIPELINING", "SIZE 10000000", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES"]
LEFT_SECONDS = 10.0  # for what ends by itself after the last session
PLAYED: dict[str, tuple[bool, bool, bool]] = {}


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """uvloop; asyncio for the mode of that name."""
    mode = request.node.callspec.params.get("mode", "plain")
    return "asyncio", {"use_uvloop": mode != "asyncio"}


@pytest.fixture
def spools(monkeypatch: pytest.MonkeyPatch) -> list[Spool]:
    """Every spool that is made."""
    made: list[Spool] = []
    plain = Spool.__init__

    def noted(spool: Spool, space: SpoolSpace) -> None:
        made.append(spool)
        plain(spool, space)

    monkeypatch.setattr(Spool, "__init__", noted)
    return made


@pytest.fixture(scope="session")
def client_certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate with key for tim@example.org, and the CA that signed it."""
    import trustme

    folder = tmp_path_factory.mktemp("client")
    authority = trustme.CA()
    leaf = authority.issue_cert("tim@example.org")
    leaf.private_key_and_cert_chain_pem.write_to_path(str(folder / "client.pem"))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return folder / "client.pem", folder / "ca.pem"


@pytest.mark.anyio
@pytest.mark.parametrize(("transcript", "mode"), CASES)
async def test_dialogue(
    transcript: Transcript,
    mode: str,
    tls_files: tuple[Path, Path],
    client_certificate: tuple[Path, Path],
    spools: list[Spool],
    request: pytest.FixtureRequest,
) -> None:
    running_before = asyncio.all_tasks()
    play = transcript.play
    store = transcript.protocol("C") in ("imap", "pop3")
    ehlo = play.get("ehlo", [] if store else EHLO)
    assert isinstance(ehlo, list)
    upstreams = {"U": Upstream(ehlo), "V": Upstream(ehlo)}
    ports = {name: await upstream.start() for name, upstream in upstreams.items()}
    port = free_port()
    scheme = transcript.protocol("C")
    if mode == "tls":
        scheme = f"{'smtp' if scheme == 'lmtp' else scheme}s"
    assume = {"assume": play.get("assume", ehlo)}
    pipeline: dict[str, object] = {
        "hostname": "gateway.test",
        "listen": [{"url": f"{scheme}://127.0.0.1:{port}", **_mapping(play.get("listen"))}],
        "relay": "open",
        "upstreams": {"mta": {"servers": [f"{transcript.protocol('U')}://<U>"], "capabilities": assume, **_mapping(play.get("pool"))}},
        "stages": [{"users": {"users": {"tim": "tanstaaf"}}}, "splice"] if store else [{"splice": {"handoff": "never"}}],
        "allow_plaintext_auth": store,
        **transcript.pipeline,
    }
    if play.get("tls") or mode in ("tls", "starttls"):
        pipeline["tls"] = {"certificates": [{"chain": str(tls_files[0]), "key": str(tls_files[1])}]}
    certificate = None
    if "certificate" in play:
        certificate = client_certificate[0] if play["certificate"] else None
        pipeline["tls"] = {
            **_mapping(pipeline["tls"]), "client_ca": str(client_certificate[1]), "verify_client": "optional",
        }  # fmt: skip
    addresses = {f"<{name}>": f"127.0.0.1:{number}" for name, number in ports.items()}
    try:
        async with running(_filled(pipeline, addresses), stages=STAGES) as gateway:  # type: ignore[arg-type]

            async def stop() -> None:
                await gateway.pipeline.stop(5.0)

            player = Player(transcript, port, upstreams, mode, stop=stop, certificate=certificate)
            try:
                await player.play()
                await gateway.idle()
                assert gateway.pipeline.served is not None and gateway.pipeline.served.spool.used == 0
            finally:
                for upstream in upstreams.values():
                    upstream.stop()  # a QUIT that the script does not show is not waited for
            encrypted = player.writer.get_extra_info("ssl_object") is not None
            on_uvloop = type(asyncio.get_running_loop()).__module__.startswith("uvloop")
            PLAYED[request.node.name] = (encrypted, on_uvloop, len(player.played) >= len(transcript.steps) - 1)
    finally:
        for upstream in upstreams.values():
            upstream.stop()
    left = asyncio.all_tasks() - running_before
    assert not left or not (await asyncio.wait(left, timeout=LEFT_SECONDS))[1], "tasks that nobody ends"
    assert all(spool._closed for spool in spools), "a message that is kept for nobody"


def test_each_was_played_as_it_claims(request: pytest.FixtureRequest) -> None:
    """After the dialogues: what was selected was played to its end, in the mode of its name."""
    selected = [item for item in request.session.items if getattr(item, "originalname", "") == "test_dialogue"]
    for item in selected:
        params = getattr(item, "callspec").params  # noqa: B009
        mode, transcript = params["mode"], params["transcript"]
        assert item.name in PLAYED, item.name
        encrypted, on_uvloop, whole = PLAYED[item.name]
        assert whole, item.name
        assert on_uvloop == (mode != "asyncio"), item.name
        starts_tls = any(step.text == "starttls" for step in transcript.steps)
        assert encrypted == (mode in ("tls", "starttls") or starts_tls), item.name


def test_each_mode_is_used() -> None:
    """Whoever adds a mode also plays it."""
    assert {mode for transcript in TRANSCRIPTS for mode in transcript.modes} == set(MODES)


def _mapping(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, dict) else {}


def _filled(value: object, addresses: dict[str, str]) -> object:
    """The same with `<U>` and `<V>` replaced in every text."""
    match value:
        case str():
            for name, address in addresses.items():
                value = value.replace(name, address)
            return value
        case dict():
            return {key: _filled(item, addresses) for key, item in value.items()}
        case list():
            return [_filled(item, addresses) for item in value]
    return value
