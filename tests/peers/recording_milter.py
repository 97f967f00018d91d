"""A filter on libmilter that records what it is told, and does what a message asks for. A program of its own:

    python recording_milter.py unix:/path/of/socket events.jsonl [option...]

Each event is one JSON line: `session` (1 is the first), `event`, its arguments, the `macros` known. Octets are
Latin-1 text. The last line of an orderly end is `stopped`.

Options choose what is agreed with the MTA: `noreply:EVENT`, `nocallback:EVENT`, `rcpt_rej`, `leading_space`,
`read_only` (no actions), `macros:EVENT=NAME,NAME`; and what it does: `answer:EVENT=VERDICT` for every session, `skip`
(after the first chunk of a body), `sizes` (bodies are recorded as numbers of octets only).

EVENT is connect, helo, mail, rcpt, data, header, eoh, body, eom, unknown. VERDICT is continue, accept, reject,
tempfail, discard, lines (three lines of refusal). Before the content, a verdict is asked for by a name: that of HELO
(`reject.test`), the local part of a recipient (`reject@...`, `reject-any@...`) or of the sender (`reject@...`, and
`reject-EVENT@...` for an event after MAIL). In the content, header fields `X-Do` ask for what `EDITS` and `ENDINGS`
list, and are obeyed in their order at the end; `at EVENT VERDICT` is obeyed before. `\\n` stands for a line feed.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

import Milter

VERDICTS = {
    "continue": Milter.CONTINUE,
    "accept": Milter.ACCEPT,
    "reject": Milter.REJECT,
    "tempfail": Milter.TEMPFAIL,
    "discard": Milter.DISCARD,
    "lines": Milter.REJECT,
}
# Per event: what to ask for to give no reply, what to ask for not to be called, the stage of its macros.
EVENTS: dict[str, tuple[int, int, int | None]] = {
    "connect": (Milter.P_NR_CONN, Milter.P_NOCONNECT, Milter.M_CONNECT),
    "helo": (Milter.P_NR_HELO, Milter.P_NOHELO, Milter.M_HELO),
    "mail": (Milter.P_NR_MAIL, Milter.P_NOMAIL, Milter.M_ENVFROM),
    "rcpt": (Milter.P_NR_RCPT, Milter.P_NORCPT, Milter.M_ENVRCPT),
    "data": (Milter.P_NR_DATA, Milter.P_NODATA, Milter.M_DATA),
    "header": (Milter.P_NR_HDR, Milter.P_NOHDRS, None),
    "eoh": (Milter.P_NR_EOH, Milter.P_NOEOH, Milter.M_EOH),
    "body": (Milter.P_NR_BODY, Milter.P_NOBODY, None),
    "unknown": (Milter.P_NR_UNKN, Milter.P_NOUNKNOWN, None),
    "eom": (0, 0, Milter.M_EOM),
}
MACROS = [
    "j", "_", "v", "i", "{daemon_name}", "{daemon_addr}", "{daemon_port}", "{client_addr}", "{client_name}",
    "{client_port}", "{client_ptr}", "{client_connections}", "{client_resolve}", "{if_name}", "{if_addr}",
    "{auth_type}", "{auth_authen}", "{auth_author}", "{mail_addr}", "{mail_host}", "{mail_mailer}", "{rcpt_addr}",
    "{rcpt_host}", "{rcpt_mailer}", "{tls_version}", "{cipher}", "{cipher_bits}", "{cert_subject}", "{cert_issuer}",
    "{verify}", "{msg_id}",
]  # fmt: skip


class Journal:
    """The file of events; sessions write from threads of their own."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()
        self.sessions = itertools.count(1)

    def write(self, **event: object) -> None:
        """Add a line."""
        line = json.dumps({"time": time.time(), **event}) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()


class Options:
    """What the command line asks for."""

    def __init__(self, words: list[str]) -> None:
        self.flags: set[str] = set()
        self.answers: dict[str, str] = {}
        self.macros: dict[str, str] = {}
        self.protocol = Milter.P_SKIP
        for word in words:
            kind, _, rest = word.partition(":")
            event, _, value = rest.partition("=")
            if not rest:
                self.flags.add(word)
            elif kind == "answer":
                self.answers[event] = value
            elif kind == "macros":
                self.macros[event] = value.replace(",", " ")
            else:
                self.protocol |= EVENTS[event][{"noreply": 0, "nocallback": 1}[kind]]
        if unknown := self.flags - {"skip", "sizes", "rcpt_rej", "leading_space", "read_only"}:
            sys.exit(f"recording_milter: no such option: {unknown}")
        self.protocol |= Milter.P_RCPT_REJ if "rcpt_rej" in self.flags else 0
        self.protocol |= Milter.P_HDR_LEADSPC if "leading_space" in self.flags else 0


class Recorder(Milter.Base):  # type: ignore[misc]  # pymilter has no types
    """One session with the MTA."""

    journal: Journal
    options: Options

    def __init__(self) -> None:
        self.number = next(self.journal.sessions)
        self.agreed = 0
        self.forget()

    def forget(self) -> None:
        """Begin a transaction."""
        self.orders: list[tuple[str, str]] = []
        self.fields: list[str] = []
        self.octets = 0
        self.sender = b""

    # -- events -----------------------------------------------------------------------------------------------

    def negotiate(self, opts: list[int]) -> int:
        """The MTA's offer, and what is taken of it."""
        offered = list(opts)
        for event, names in self.options.macros.items():
            self._ctx.setsymlist(EVENTS[event][2], names)
        opts[0] = 0 if "read_only" in self.options.flags else offered[0]
        self._actions = opts[0]
        self.agreed = opts[1] = offered[1] & self.options.protocol
        opts[2] = opts[3] = 0
        self.journal.write(session=self.number, event="negotiate", actions=offered[0], protocol=offered[1])
        return int(Milter.CONTINUE)

    def connect(self, hostname: str, family: int, hostaddr: object) -> int:
        return self._answer("connect", name=hostname, family=family, address=hostaddr)

    def hello(self, hostname: str) -> int:
        return self._answer("helo", hostname.partition(".")[0], name=hostname)

    @Milter.decode("bytes")  # type: ignore[untyped-decorator]
    def envfrom(self, address: bytes, *parameters: bytes) -> int:
        self.forget()
        self.sender = local_part(address)
        return self._answer("mail", text(self.sender), address=text(address), parameters=[*map(text, parameters)])

    @Milter.decode("bytes")  # type: ignore[untyped-decorator]
    def envrcpt(self, address: bytes, *parameters: bytes) -> int:
        asked = local_part(address).partition(b"-")[0]
        return self._answer("rcpt", text(asked), address=text(address), parameters=[*map(text, parameters)])

    def data(self) -> int:
        return self._answer("data")

    @Milter.decode("bytes")  # type: ignore[untyped-decorator]
    def header(self, name: str, value: bytes) -> int:
        self.fields.append(name.lower())
        if name.lower() == "x-do":
            verb, _, rest = text(value).strip().partition(" ")
            self.orders.append((verb, rest.replace("\\n", "\n")))
        return self._answer("header", name=name, value=text(value))

    def eoh(self) -> int:
        return self._answer("eoh")

    def body(self, chunk: bytes) -> int:
        self.octets += len(chunk)
        data = {} if "sizes" in self.options.flags else {"data": text(chunk)}
        verdict = self._answer("body", size=len(chunk), **data)
        if verdict == Milter.CONTINUE and "skip" in self.options.flags and self.agreed & Milter.P_SKIP:
            return int(Milter.SKIP)
        return verdict

    def unknown(self, command: str) -> int:
        return self._answer("unknown", command=command)

    def eom(self) -> int:
        verdict = self._answer("eom", size=self.octets)
        for verb, rest in self.orders:
            if verb in EDITS:
                EDITS[verb](self, rest)
            elif verb in ENDINGS:
                return ENDINGS[verb](self, rest)
        return verdict

    def abort(self) -> int:
        self.journal.write(session=self.number, event="abort")
        return int(Milter.CONTINUE)

    def close(self) -> int:
        self.journal.write(session=self.number, event="close")
        return int(Milter.CONTINUE)

    # -- answers ----------------------------------------------------------------------------------------------

    def _answer(self, event: str, asked: str = "", **arguments: object) -> int:
        macros = {name: value for name in MACROS if (value := self.getsymval(name))}
        self.journal.write(session=self.number, event=event, **arguments, macros=macros)
        orders = [rest.split() for verb, rest in self.orders if verb == "at"]
        orders += [[event, name] for name, _, place in [text(self.sender).partition("-")] if place == event]
        chosen = next((order[1] for order in orders if order[0] == event), "")
        chosen = chosen or (asked if asked in VERDICTS else "") or self.options.answers.get(event, "continue")
        if EVENTS[event][0] & self.agreed:
            return int(Milter.NOREPLY)
        return self.verdict(chosen)

    def verdict(self, name: str) -> int:
        """What to return for a verdict by this name; refusals get a text of their own."""
        if name == "lines":
            self.setreply("554", "5.6.0", "three", "lines, 100%%", "of refusal")
        elif name == "reject":
            self.setreply("550", "5.7.1", "refused as asked")
        elif name == "tempfail":
            self.setreply("450", "4.7.1", "not now, as asked")
        return int(VERDICTS[name])


def text(octets: bytes) -> str:
    """Octets as JSON can hold them."""
    return octets.decode("latin-1")


def local_part(address: bytes) -> bytes:
    """Of an address in angle brackets."""
    return address.strip(b"<>").partition(b"@")[0]


def named(rest: str) -> tuple[str, str]:
    """`Name: value`."""
    name, _, value = rest.partition(":")
    return name.strip(), value.removeprefix(" ")


def insert(filter_: Recorder, rest: str) -> None:
    """`insert INDEX Name: value`."""
    index, _, field = rest.partition(" ")
    filter_.addheader(*named(field), int(index))


def change(filter_: Recorder, rest: str) -> None:
    """`change N Name: value`: the n-th field of this name."""
    index, _, field = rest.partition(" ")
    name, value = named(field)
    filter_.chgheader(name, int(index), value)


def delete(filter_: Recorder, rest: str) -> None:
    """`delete N Name`."""
    index, name = rest.split()
    filter_.chgheader(name, int(index), None)


def delete_all(filter_: Recorder, rest: str) -> None:
    """`delete_all Name Name`: all fields of these names, the last ones first."""
    for name in rest.split():
        for index in range(filter_.fields.count(name.lower()), 0, -1):
            filter_.chgheader(name, index, None)


def with_parameters(method: str) -> Callable[[Recorder, str], None]:
    """`sender ADDRESS PARAMETERS`, `recipient ADDRESS PARAMETERS`; no address is the null sender."""

    def edit(filter_: Recorder, rest: str) -> None:
        address, _, parameters = rest.partition(" ")
        getattr(filter_, method)(f"<{address.strip('<>')}>", parameters or None)

    return edit


def body_size(filter_: Recorder, rest: str) -> None:
    """`body_size OCTETS`: a body of numbered lines, of 64 octets each with their ends."""
    lines = (b"%062d\r\n" % number for number in range(int(rest) // 64))
    filter_.replacebody(b"".join(lines))


def wait(filter_: Recorder, rest: str) -> None:
    """`wait PATH`: until somebody has opened and closed that FIFO."""
    with open(rest.strip(), "rb") as fifo:
        fifo.read()


def explode(filter_: Recorder, rest: str) -> None:
    """`raise`: an error of the filter's own."""
    raise RuntimeError("as asked")


EDITS: dict[str, Callable[[Recorder, str], object]] = {
    "add": lambda filter_, rest: filter_.addheader(*named(rest)),
    "insert": insert,
    "change": change,
    "delete": delete,
    "delete_all": delete_all,
    "sender": with_parameters("chgfrom"),
    "recipient": with_parameters("addrcpt"),
    "remove": lambda filter_, rest: filter_.delrcpt(f"<{rest.strip('<>')}>"),
    "body": lambda filter_, rest: filter_.replacebody(rest.replace("\n", "\r\n").encode("latin-1") + b"\r\n"),
    "body_size": body_size,
    "quarantine": lambda filter_, rest: filter_.quarantine(rest or "as asked"),
    "progress": lambda filter_, rest: filter_.progress(),
    "sleep": lambda filter_, rest: time.sleep(float(rest)),
    "wait": wait,
    "raise": explode,
    "crash": lambda filter_, rest: os._exit(3),
}
ENDINGS: dict[str, Callable[[Recorder, str], int]] = {
    name: lambda filter_, rest, name=name: filter_.verdict(name)  # type: ignore[misc]
    for name in VERDICTS
}


def main() -> None:
    """Run until SIGTERM."""
    place, events, *words = sys.argv[1:]
    with open(events, "a", encoding="ascii") as file:
        Recorder.journal = Journal(file)
        Recorder.options = Options(words)
        Milter.factory = Recorder
        Milter.set_flags(Milter.CURR_ACTS)
        Milter.set_exception_policy(Milter.TEMPFAIL)
        os.umask(0)  # the MTA runs as another user
        Milter.runmilter("recorder", place, 240)
        Recorder.journal.write(session=0, event="stopped")


if __name__ == "__main__":
    main()
