"""pipelines/stores.yaml as it stands: `gateway run` in front of a Dovecot that does the logins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.interop.gateway_process import GatewayProcess, installation
from tests.interop.store_site import MESSAGE, PROTOCOLS, StoreSite, store_site
from tests.peers.mail_clients import curl, curl_fetch
from tests.peers.process import free_port, scratch

pytestmark = pytest.mark.peers

PORTS = ("IMAP_PORT", "IMAPS_PORT", "POP3_PORT", "POP3S_PORT")


@pytest.fixture(scope="module")
def site() -> Iterator[StoreSite]:
    with store_site() as site:
        yield site


def test_stores(site: StoreSite) -> None:
    ports = {name: free_port() for name in PORTS}
    dovecot = {f"DOVECOT_{name.upper()}": f"127.0.0.1:{getattr(site.store, name).plain}" for name in PROTOCOLS}
    variables = {name: str(port) for name, port in ports.items()} | dovecot
    with scratch("gateway-") as folder:
        installation(folder, (site.chain, site.key))
        with GatewayProcess(folder, "pipelines/stores.yaml", variables=variables) as gateway:
            for protocol in PROTOCOLS:
                place = site.place(protocol, ports[f"{protocol.upper()}_PORT"], ports[f"{protocol.upper()}S_PORT"])
                user = site.store.user()
                site.store.put(user, MESSAGE)
                for mode in ("starttls", "tls"):
                    run = curl_fetch(place, mode, user, folder)
                    assert run.content == MESSAGE, run
                assert site.store.wait_login(protocol, user)["rip"] == "127.0.0.1"
                wrong = type(user)(user.name, "wrong", user.token)
                assert curl(place, "tls", wrong, folder).status == 67
            assert {record["user"] for record in gateway.wait_record("auth_failure", 2)} != {""}
            assert gateway.stop() == 0
