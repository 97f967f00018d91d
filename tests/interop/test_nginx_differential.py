"""The same client scripts through nginx with a file and through the gateway with that very file imported.

Behind both are the same auth server and the same upstream. Compared are the bytes that the client saw and when it was
closed, the header lines that the auth server was sent, the bytes that the upstream was sent. A script says what nginx
does; where the gateway differs it says how, and names the reason: a row of docs/nginx.md, "Intended differences".
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.interop import (
    nginx_scripts_auth,
    nginx_scripts_imap,
    nginx_scripts_listen,
    nginx_scripts_pop3,
    nginx_scripts_smtp,
    nginx_scripts_stop,
    nginx_scripts_tls,
    nginx_scripts_upstream,
)
from tests.interop.nginx_differences import ids_amiss, listed, wrong_at_gateway, wrong_at_nginx
from tests.interop.nginx_legs import Cast, Outcome, imported_gateway, nginx, play
from tests.interop.nginx_scripts import Script, Step, parse
from tests.interop.nginx_servers import SERVERS, Site
from tests.peers.process import scratch

pytestmark = [pytest.mark.peers, pytest.mark.slow]

BOOKS = [
    nginx_scripts_smtp.SCRIPTS,
    nginx_scripts_imap.SCRIPTS,
    nginx_scripts_pop3.SCRIPTS,
    nginx_scripts_auth.SCRIPTS,
    nginx_scripts_upstream.SCRIPTS,
    nginx_scripts_listen.SCRIPTS,
    nginx_scripts_tls.SCRIPTS,
    nginx_scripts_stop.SCRIPTS,
]
SCRIPTS = [script for book in BOOKS for script in parse(book)]
NUMBERED = dict(enumerate(SCRIPTS))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """The file and what it names."""
    with scratch() as folder:
        yield Site(folder)


def _wanted(request: pytest.FixtureRequest) -> dict[int, Script]:
    """The scripts whose tests were chosen."""
    chosen = {item.callspec.params.get("number") for item in request.session.items if hasattr(item, "callspec")}
    return {number: script for number, script in NUMBERED.items() if number in chosen}


@pytest.fixture(scope="module")
def at_nginx(site: Site, request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """What nginx did."""
    return play(site, nginx(site), _wanted(request), gateway=False)


@pytest.fixture(scope="module")
def at_gateway(site: Site, at_nginx: dict[str, Outcome], request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """What the gateway did, on the same ports after nginx left them."""
    return play(site, imported_gateway(site.folder, site.configuration), _wanted(request), gateway=True)


@pytest.mark.parametrize("number", NUMBERED, ids=lambda number: SCRIPTS[number].name)
def test_nginx_does_as_the_script_says(number: int, site: Site, at_nginx: dict[str, Outcome]) -> None:
    script = SCRIPTS[number]
    wrong = wrong_at_nginx(Cast(number, script, site), at_nginx[script.name])
    assert not wrong, f"@ {script.server}\n{wrong}"


@pytest.mark.parametrize("number", NUMBERED, ids=lambda number: SCRIPTS[number].name)
def test_gateway_does_as_nginx(
    number: int, site: Site, at_nginx: dict[str, Outcome], at_gateway: dict[str, Outcome]
) -> None:
    script = SCRIPTS[number]
    wrong = wrong_at_gateway(Cast(number, script, site), at_nginx[script.name], at_gateway[script.name])
    assert not wrong, f"@ {script.server}\n{wrong}"


def test_there_are_many_scripts_of_each_kind() -> None:
    assert len(SCRIPTS) >= 450
    assert len({script.name for script in SCRIPTS}) == len(SCRIPTS)
    assert {script.server for script in SCRIPTS} == set(SERVERS)
    for script in SCRIPTS:
        assert script.nginx.steps, script.name
        other = script.gateway
        told = [other.steps, other.sent, other.missing or None, other.extra or None]
        assert any(part is not None for part in told) == bool(script.differs), script.name


def test_each_difference_is_in_the_document_and_shown() -> None:
    assert ids_amiss(SCRIPTS, listed()) == []


def test_the_comparison_tells_differences() -> None:
    script = Script("one", "smtp")
    script.nginx.steps = [Step(">", "NOOP"), Step("<", "250 2.0.0 OK")]
    with scratch() as folder:
        cast = Cast(0, script, Site(folder))
    same = Outcome(["< 220 mx.test ESMTP ready", "> NOOP", "< 250 2.0.0 OK"], ["GET /auth"], ["^ EHLO mx.test"])
    assert wrong_at_nginx(cast, same) == wrong_at_gateway(cast, same, same) == ""
    for other in (
        Outcome([*same.client, "<."], same.auth, same.upstream),
        Outcome(same.client, same.auth * 2, same.upstream),
        Outcome(same.client, same.auth, []),
    ):
        assert wrong_at_gateway(cast, same, other)
    script.differs = ["some"]
    assert wrong_at_gateway(cast, same, same)
