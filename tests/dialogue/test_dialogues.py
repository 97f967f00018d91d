"""Every transcript below this folder, in each way it says it can be played, against a real listener."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.testing.dialogue import Player, Transcript, Upstream, parse
from gateway.testing.gateway import free_port, running

FOLDER = Path(__file__).parent
TRANSCRIPTS = [parse(path) for path in sorted(FOLDER.rglob("*.txt"))]
CASES = [
    pytest.param(transcript, mode, id=f"{transcript.path.relative_to(FOLDER).with_suffix('')}-{mode}")
    for transcript in TRANSCRIPTS
    for mode in transcript.modes
]


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """uvloop; asyncio for the mode of that name."""
    mode = request.node.callspec.params.get("mode", "plain")
    return "asyncio", {"use_uvloop": mode != "asyncio"}


@pytest.mark.anyio
@pytest.mark.parametrize(("transcript", "mode"), CASES)
async def test_dialogue(transcript: Transcript, mode: str, tls_files: tuple[Path, Path]) -> None:
    play = transcript.play
    ehlo = play.get("ehlo", ["PIPELINING", "SIZE 10000000", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES"])
    assert isinstance(ehlo, list)
    upstream = Upstream(ehlo)
    upstream_port = await upstream.start()
    port = free_port()
    scheme = "smtps" if mode == "tls" else "smtp"
    pipeline: dict[str, object] = {
        "hostname": "gateway.test",
        "listen": [{"url": f"{scheme}://127.0.0.1:{port}", **_mapping(play.get("listen"))}],
        "relay": "open",
        "upstreams": {"mta": {"servers": [f"smtp://127.0.0.1:{upstream_port}"], "capabilities": {"assume": ehlo}}},
        "stages": [{"splice": {"handoff": "never"}}],
        **transcript.pipeline,
    }
    if play.get("tls") or mode in ("tls", "starttls"):
        pipeline["tls"] = {"certificates": [{"chain": str(tls_files[0]), "key": str(tls_files[1])}]}
    try:
        async with running(pipeline, folder=transcript.path.parent / "files" if play.get("files") else None) as gateway:
            await Player(transcript, port, upstream, mode).play()
            await gateway.idle()
    finally:
        upstream.stop()


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
