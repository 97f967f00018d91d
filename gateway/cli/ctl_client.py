"""How `gateway ctl` talks to the admin API: one HTTP request a question, over its unix socket or TCP."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast
from urllib.parse import quote, urlencode, urlsplit

from gateway.admin.place import default_socket

Object = dict[str, object]

TIMEOUT: Final = 15.0
SERVICE_SOCKET: Final = Path("/run/gateway/admin.sock")


class Unreachable(Exception):
    """Nobody answers; the text names the place and what to do."""


class Refused(Exception):
    """The gateway said no; its words."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """The API at `url` (`http://host:port`, with a token) or at a unix socket: by default where the service has it."""

    def __init__(self, path: Path | None = None, url: str = "", token: str = "") -> None:
        self._path = path or _usual_socket()
        self._url = urlsplit(url) if url else None
        self._token = token
        self.place = url or str(self._path)

    def get(self, path: str, **query: object) -> Object:
        """The answer to GET. Raises Unreachable, Refused."""
        return self._ask("GET", _with_query(path, query), None)

    def post(self, path: str, body: Mapping[str, object] | None = None, *, timeout: float | None = TIMEOUT) -> Object:
        """The answer to POST. Raises Unreachable, Refused."""
        return self._ask("POST", path, body or {}, timeout)

    def delete(self, path: str, **query: object) -> Object:
        """The answer to DELETE. Raises Unreachable, Refused."""
        return self._ask("DELETE", _with_query(path, query), None)

    def _connection(self, timeout: float | None) -> http.client.HTTPConnection:
        if self._url is None:
            return _UnixConnection(self._path, timeout)
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        return kind(self._url.netloc, timeout=timeout)

    def _ask(
        self, method: str, path: str, body: Mapping[str, object] | None, timeout: float | None = TIMEOUT
    ) -> Object:
        headers = {"Accept": "application/json"}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        connection = self._connection(timeout)
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(self._explained(error)) from None
        finally:
            connection.close()
        return _result(self.place, status, text)

    def _explained(self, error: Exception) -> str:
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
        if self._url is not None:
            advice = "is the gateway running, and is that its `process.admin`?"
        elif isinstance(error, PermissionError):
            advice = "be its owner (sudo), or let more users in: `process.admin: {listen: ..., mode: ...}`"
        elif isinstance(error, TimeoutError):
            advice = "the gateway runs but does not answer; its log may say why"
        else:
            advice = "is the gateway running (gateway run FILE)? --socket names another socket, --url an address"
        return f"no answer at {self.place}: {reason}; {advice}"


def path_of(*parts: str) -> str:
    """A path whose parts may hold anything, a server's URL too."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def _with_query(path: str, query: Mapping[str, object]) -> str:
    given = {name: str(value) for name, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path


def _usual_socket() -> Path:
    """Where this user's own gateway would have it; if nothing is there, where the system's has it."""
    path = default_socket()
    return SERVICE_SOCKET if not os.path.exists(path) and os.path.exists(SERVICE_SOCKET) else path


def _result(place: str, status: int, text: bytes) -> Object:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Unreachable(f"{place} is not a gateway: it answers {status} without a JSON object")
    if status >= 400:
        raise Refused(status, str(found.get("error") or f"status {status}"))
    return cast(Object, found)
