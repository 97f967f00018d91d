"""The answer of an auth_http server: nginx's protocol, which is header fields only, and what we read beyond it.

Rules: nginx's ngx_mail_auth_http_module. The status line and the body say nothing. Of repeated fields the last
counts, but no OK undoes an error text or WAIT. An empty Auth-Status says nothing in SMTP, and in IMAP and POP3 it is an
error without a text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv6Address
from typing import Final

from gateway.protocol.errors import PeerError
from gateway.protocol.http1 import Headers

MAX_TEXT: Final = 400
"""Characters of an error text that are passed on."""

_UNPRINTABLE: Final = re.compile(r"[^ -~]")
ERROR_CODE: Final = re.compile(r"([45])\d\d(?: \1\.\d{1,3}\.\d{1,3})?")
"""What stands in front of an error text: 4xx or 5xx, with an enhanced code of the same class or without."""
_HOST: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,253}[A-Za-z0-9_])?\.?")


@dataclass(frozen=True, slots=True)
class Answer:
    """What an auth server said.

    `error`: one line of printable ASCII for the client, which may be empty; None for OK and for `wait` (ask again).
    `seconds` is Auth-Wait, 0 if there is none. `code`: Auth-Error-Code, a 4xx or 5xx with or without enhanced code, ""
    if it sent none that is valid. Where to go: `pool`, or `server` as `host:port`, `[v6]:port` or `unix:/path`, or
    neither. `user` and `password` override the client's; None and "" where it sent none.
    """

    error: str | None
    wait: bool
    seconds: float
    code: str
    pool: str
    server: str
    user: str = field(repr=False)
    password: str | None = field(repr=False)


def parse_answer(headers: Headers, protocol: str = "smtp") -> Answer:
    """Read the header fields of a response to a client of this protocol; names are in lower case.

    Raises `PeerError` for an upstream that is none, and for an answer that says nothing: without Auth-Status it must
    at least name an upstream, as nginx demands, or any error page would be a login.
    """
    found: dict[str, str] = {}
    error: str | None = None
    wait = False
    for name, value in headers:
        if not name.startswith("auth-"):
            continue
        text = found[name] = value.decode("utf-8", "surrogateescape")
        if name == "auth-status" and text == "WAIT":
            wait = True
        elif name == "auth-status" and text != "OK" and (text or protocol in ("imap", "pop3")):
            error = _UNPRINTABLE.sub("?", text)[:MAX_TEXT]
    accepted = error is None and not wait
    pool = found.get("auth-upstream", "") if accepted else ""
    server = _server(found) if accepted and not pool else ""
    if accepted and not (pool or server or found.get("auth-status") == "OK"):
        raise PeerError("auth server sent neither Auth-Status nor server and port")
    seconds, code = found.get("auth-wait", ""), found.get("auth-error-code", "")
    return Answer(
        error=error,
        wait=wait and error is None,
        seconds=float(seconds) if seconds.isascii() and seconds.isdigit() and len(seconds) < 8 else 0.0,
        code=code if ERROR_CODE.fullmatch(code) else "",
        pool=pool,
        server=server,
        user=found.get("auth-user", ""),
        password=found.get("auth-pass"),
    )


def _server(found: dict[str, str]) -> str:
    """Auth-Server and Auth-Port as one; "" if neither is there."""
    host, port = found.get("auth-server", ""), found.get("auth-port", "")
    if host.startswith("unix:/") and host.isprintable():
        return host
    if not host and not port:
        return ""
    if not host or not port:
        raise PeerError("auth server did not send server or port")
    if not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
        raise PeerError("auth server sent invalid server port")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in bare and "%" not in bare:  # a zone means nothing in another machine's words
        try:
            return f"[{IPv6Address(bare).compressed}]:{port}"
        except AddressValueError:
            raise PeerError("auth server sent invalid server address") from None
    if not _HOST.fullmatch(host):
        raise PeerError("auth server sent invalid server address")
    return f"{host}:{port}"
