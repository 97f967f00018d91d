"""An auth server to try `auth_http` with: nginx's auth_http protocol in a page of aiohttp.

It knows the users of a file (`user:password` lines) and of --user, else demo@example.org with password demo, and
sends everybody to one upstream. Clients without AUTH (Auth-Method none) may send to any recipient at example.org.

    python examples/auth_server.py --listen 127.0.0.1:8025 --upstream 127.0.0.1:10025
    python examples/auth_server.py --upstream pool:mailbox --user alice@example.org:secret --key demo
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import re
from pathlib import Path
from urllib.parse import unquote

from aiohttp import web

DEMO = "demo@example.org:demo"
OPEN_DOMAIN = "@example.org"


class AuthServer:
    """Answers one question a request; `users` maps names to passwords."""

    def __init__(self, users: dict[str, str], upstream: str, key: str = "") -> None:
        self.users = users
        self.key = key
        if upstream.startswith("pool:"):
            self.where = {"Auth-Upstream": upstream.removeprefix("pool:")}
        else:
            host, _, port = upstream.rpartition(":")
            self.where = {"Auth-Server": host, "Auth-Port": port}

    async def answer(self, request: web.Request) -> web.Response:
        """Status and body say nothing in this protocol: the header fields are the answer."""
        if self.key and not hmac.compare_digest(request.headers.get("X-Auth-Key", "").encode(), self.key.encode()):
            return _refused("Temporary server problem, try again later", code="451 4.3.0")
        method = request.headers.get("Auth-Method", "")
        if method == "none":
            recipient = re.search(r"<([^>]*)>", request.headers.get("Auth-SMTP-To", ""))
            if recipient and recipient[1].lower().endswith(OPEN_DOMAIN):
                return web.Response(headers={"Auth-Status": "OK", **self.where})
            return _refused("Relaying denied", code="550 5.7.1")
        user = unquote(request.headers.get("Auth-User", ""))
        known = self.users.get(user.lower(), "")
        if known and self._fits(method, known, request):
            return web.Response(headers={"Auth-Status": "OK", **self.where})
        return _refused("Invalid login or password")

    def _fits(self, method: str, known: str, request: web.Request) -> bool:
        given = unquote(request.headers.get("Auth-Pass", ""))
        if method == "cram-md5":
            salt = request.headers.get("Auth-Salt", "")
            known = hmac.new(known.encode(), salt.encode(), "md5").hexdigest()
        elif method != "plain":
            return False
        return hmac.compare_digest(given.encode("utf-8", "replace"), known.encode())


def _refused(text: str, code: str = "") -> web.Response:
    """`Auth-Wait` keeps the session: the client may try again."""
    headers = {"Auth-Status": text, "Auth-Wait": "3"}
    if code:
        headers["Auth-Error-Code"] = code
    return web.Response(headers=headers)


def read_users(path: Path | None, entries: list[str]) -> dict[str, str]:
    """The users of a file and of the command line, or the demo user."""
    lines = [*(path.read_text().splitlines() if path else []), *entries] or [DEMO]
    pairs = (line.partition(":") for line in lines if ":" in line and not line.startswith("#"))
    return {user.strip().lower(): password for user, _, password in pairs}


async def serve(listen: str, server: AuthServer) -> None:
    """Serve until stopped; prints where."""
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    host, _, port = listen.rpartition(":")
    await web.TCPSite(runner, host.strip("[]"), int(port)).start()
    for address in runner.addresses:
        print(f"auth server: http://{address[0]}:{address[1]}/auth", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="An auth server that speaks nginx's auth_http protocol.")
    parser.add_argument("--listen", default="127.0.0.1:8025", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--upstream", default="127.0.0.1:10025", metavar="HOST:PORT|pool:NAME", help="where mail goes (%(default)s)"
    )
    parser.add_argument("--user", action="append", default=[], metavar="USER:PASSWORD", help="may be repeated")
    parser.add_argument("--users", type=Path, metavar="FILE", help="user:password lines")
    parser.add_argument("--key", default="", help="the X-Auth-Key that requests must carry")
    arguments = parser.parse_args()
    users = read_users(arguments.users, arguments.user)
    try:
        asyncio.run(serve(arguments.listen, AuthServer(users, arguments.upstream, arguments.key)))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
