"""An auth server as people write it for nginx: a page that answers with header fields and closes.

Usage: python auth_script_page.py CONFIGURATION, a JSON file with `port`, `users` (name to password), `tokens` (name to
token), `servers` (imap, pop3, smtp to [address, port]) and `log`, where each request's fields are appended as JSON.
Nothing but the standard library, as it runs as a program of its own.
"""

import hashlib
import hmac
import json
import socketserver
import sys
from urllib.parse import unquote_to_bytes


def password_fits(request: dict[str, str], password: str, token: str) -> bool:
    """What the page does with Auth-Pass, by Auth-Method."""
    given, salt = request.get("auth-pass", ""), request.get("auth-salt", "").encode()
    match request.get("auth-method"):
        case "plain":
            return unquote_to_bytes(given).decode() == password
        case "cram-md5":
            return given == hmac.new(password.encode(), salt, "md5").hexdigest()
        case "apop":
            return given == hashlib.md5(salt + password.encode()).hexdigest()
        case "xoauth2" | "oauthbearer":
            return given == token
    return False


def answer(request: dict[str, str]) -> list[str]:
    """The fields of the page's answer."""
    user = unquote_to_bytes(request.get("auth-user", "")).decode()
    password, token = settings["users"].get(user), settings["tokens"].get(user, "")
    if password is None or not password_fits(request, password, token):
        return ["Auth-Status: Invalid login or password"]
    address, port = settings["servers"][request["auth-protocol"]]
    fields = ["Auth-Status: OK", f"Auth-Server: {address}", f"Auth-Port: {port}"]
    if request["auth-method"] in ("cram-md5", "apop"):
        fields.append(f"Auth-Pass: {password}")
    return fields


class Page(socketserver.StreamRequestHandler):
    """One request, one answer without a body or a length, closed."""

    def handle(self) -> None:
        lines = iter(lambda: self.rfile.readline().decode().rstrip("\r\n"), "")
        fields = (line.partition(": ") for line in lines)
        request = {name.lower(): value for name, _, value in fields}
        with open(settings["log"], "a") as log:
            log.write(json.dumps(request) + "\n")
        head = ["HTTP/1.0 200 OK", "X-Powered-By: PHP/8.2.7", "Content-type: text/html; charset=UTF-8"]
        self.wfile.write("\r\n".join((*head, *answer(request), "", "")).encode())


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        settings = json.load(file)
    socketserver.TCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", settings["port"]), Page) as server:
        server.daemon_threads = True
        server.serve_forever()
