"""The language of the scripts that are played to nginx and to the gateway (nginx_scripts_*.py), and its parser.

    == name                       one script, up to the next `==`
    @ server                      the server of nginx_servers.py that the client calls
    alone                         no other script runs meanwhile: the client's address does not tell it
    auth: line | line             header lines of the auth server's answer, an `auth:` for each request; `@OK` stands
                                  for those that send the client to the upstream; ` !close` (usual), ` !keep`,
                                  ` !hang`, ` !reset` say what becomes of the connection
    auth= bytes                   an answer as it is
    up VERB: text                 the upstream's reply to a verb (see tests/peers/recording_upstream.py)
    up refused                    nobody listens there
    up inside                     it is at the port that a location of the file names
    dns KIND                      what the name server says of the client (`pointer_zone`)
    > text                        the client sends a line;  `>| bytes` sends bytes
    < text                        the client is sent a line; `<| bytes` reads so many octets (at the end of a connection)
    <<                            it is sent the greeting; without this line, that comes first (`silent`: not at all)
    <.                            the server ends the connection
    >.                            the client ends its side;  `>!` it resets the connection
    late                          a pause, shorter than a clock of one second; two of them are longer
    stop                          the program is told to stop, once all scripts with this step are there
    whole                         requests to the auth server with their HTTP version and connection fields
    wait auth | up                go on when the auth server was asked, when the upstream was sent a line
    TLS word...                   the client begins a TLS handshake: `cert=NAME`, `alpn=a,b`, `max=1.2`; `fails: ALERT`
    ? header line                 the auth server was sent it, in this order; `?! text`: nothing that begins so
    ^ text                        all that the upstream was sent, line by line; `^|` for a line without an end;
                                  `^-` it was not called; `^~` nothing is said of it
    differs: id...                a difference of docs/nginx.md; what follows is so at the gateway: all of the client's
                                  steps or none, all `^` or none, `?-` and `?+` header lines that it did not or did send
                                  (`?- *`: it asked nothing)

Texts may have Python's escapes for octets. `$client` is the client's address, `$claimed` and `$claimed6` are others
that it may claim by a PROXY header, `$host` is its name, `$port` is the upstream's port, `$listener` the server's port, `$cport` the
client's. What follows `#` at the beginning of a line is a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

OK = "Auth-Status: OK\r\nAuth-Server: 127.0.0.1\r\nAuth-Port: $port"

_STEPS = ("<<", "<.", "<|", "<", ">|", ">.", ">!", ">", "wait ", "TLS", "late", "stop")
_WAYS = re.compile(r" !(close|keep|hang|reset)$")


def octets(text: str) -> bytes:
    """The bytes that a text with escapes stands for."""
    return text.encode("latin-1").decode("unicode_escape").encode("latin-1")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the client: `kind` is as written, `text` what follows it."""

    kind: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.text}".strip()


@dataclass
class Side:
    """What one of the two does in a script. None: as nginx does."""

    steps: list[Step] | None = None
    silent: bool = False
    sent: list[str] | None = None
    asked: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


@dataclass
class Script:
    """One script. `answers`: (raw, text, then); `replies`: (verb, text)."""

    name: str
    server: str = ""
    alone: bool = False
    answers: list[tuple[bool, str, str]] = field(default_factory=list)
    replies: list[tuple[str, str]] = field(default_factory=list)
    refused: bool = False
    inside: bool = False
    whole: bool = False
    dns: str = ""
    nginx: Side = field(default_factory=Side)
    gateway: Side = field(default_factory=Side)
    differs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name

    @property
    def stops(self) -> bool:
        """Whether it is about a program that is told to stop."""
        return any(step.kind == "stop" for step in self.nginx.steps or [])

    def steps(self, gateway: bool) -> list[Step]:
        """The client's steps, the greeting added."""
        side = self.gateway if gateway and self.gateway.steps is not None else self.nginx
        steps = side.steps or []
        return steps if side.silent or Step("<<") in steps else [Step("<<"), *steps]


def parse(text: str) -> Iterator[Script]:
    """The scripts in a text. Raises ValueError for a line that is none of the language."""
    for section in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        name, *lines = section.splitlines()
        script = Script(name.strip())
        side = script.nginx
        for line in lines:
            if line.startswith("differs: "):
                script.differs = line.split()[1:]
                side = script.gateway
            elif line.strip() and not line.startswith("#"):
                _line(script, side, line)
        yield script


def _line(script: Script, side: Side, line: str) -> None:
    """Take one line of a script."""
    word, _, rest = line.partition(" ")
    match word:
        case "@":
            script.server = rest
        case "alone":
            script.alone = True
        case "whole":
            script.whole = True
        case "dns":
            script.dns = rest
        case "silent":
            side.silent = True
        case "up" if rest == "refused":
            script.refused = True
        case "up" if rest == "inside":
            script.inside = True
        case "up":
            verb, _, reply = rest.partition(":")
            script.replies.append((verb, reply[1:]))
        case "auth:" | "auth=":
            way = _WAYS.search(line)
            text = rest[: len(rest) - len(way[0])] if way else rest
            script.answers.append((word == "auth=", text, way[1] if way else "close"))
        case _:
            _expectation(side, line)


def _expectation(side: Side, line: str) -> None:
    for mark, target in (("?-", side.missing), ("?+", side.extra), ("?", side.asked)):
        if line.startswith(mark) and (mark != "?" or line[1] in "! "):
            target.append(line if line.startswith("?!") else line[len(mark) + 1 :])
            return
    if line.startswith("^"):
        side.sent = side.sent or []
        side.sent.append(line)
        return
    kind = next((kind for kind in _STEPS if line.startswith(kind)), None)
    if kind is None:
        raise ValueError(f"not a line of a script: {line!r}")
    side.steps = side.steps or []
    side.steps.append(Step(kind.strip(), line[len(kind) :].removeprefix(" ")))
