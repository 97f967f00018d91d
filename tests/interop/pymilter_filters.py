"""Classes on pymilter that tests have the gateway run: they note what they are told, change it, fail when asked to."""

from __future__ import annotations

import threading
from typing import ClassVar

import Milter


class Noting(Milter.Base):  # type: ignore[misc]  # pymilter has no types
    """Notes its events, of each instance by itself, and the recipients in a field.

    A recipient `raise` makes it fail, `hang` makes it wait for `gate`; a field X-Fail of that value does so at the end.
    """

    made: ClassVar[list[Noting]] = []
    gate: ClassVar[threading.Event] = threading.Event()
    entered: ClassVar[threading.Event] = threading.Event()

    def __init__(self) -> None:
        self.events: list[str] = []
        self.recipients: list[str] = []
        self.fails = ""
        self.made.append(self)

    @classmethod
    def forget(cls) -> None:
        """Begin a test."""
        cls.made.clear()
        cls.gate, cls.entered = threading.Event(), threading.Event()
        Noting.gate, Noting.entered = cls.gate, cls.entered

    def _fail(self, how: str) -> None:
        if how == "raise":
            raise RuntimeError("as asked")
        if how == "hang":
            self.entered.set()
            assert self.gate.wait(60)

    def connect(self, hostname: str, family: int, hostaddr: object) -> int:
        self.events.append("connect")
        return int(Milter.CONTINUE)

    def hello(self, hostname: str) -> int:
        self.events.append(f"hello {hostname}")
        return int(Milter.CONTINUE)

    def envfrom(self, sender: str, *parameters: str) -> int:
        self.events.append(f"envfrom {sender}")
        self.recipients, self.fails = [], ""
        return int(Milter.CONTINUE)

    def envrcpt(self, recipient: str, *parameters: str) -> int:
        self.events.append(f"envrcpt {recipient}")
        self.recipients.append(recipient)
        self._fail(recipient.strip("<>").partition("@")[0])
        return int(Milter.CONTINUE)

    def header(self, name: str, value: str) -> int:
        if name == "X-Fail":
            self.fails = value
        return int(Milter.CONTINUE)

    def eom(self) -> int:
        self.events.append("eom")
        self._fail(self.fails)
        self.addheader("X-Noted", " ".join(self.recipients))
        return int(Milter.CONTINUE)

    def abort(self) -> int:
        self.events.append("abort")
        return int(Milter.CONTINUE)

    def close(self) -> int:
        self.events.append("close")
        return int(Milter.CONTINUE)


class Deleting(Milter.Base):  # type: ignore[misc]
    """May delete fields and nothing else: it deletes Subject and X-Filtered-By; with X-Fail it tries to add one."""

    fields: ClassVar[list[str]] = []

    def negotiate(self, opts: list[int]) -> int:
        opts[0] = Milter.CHGHDRS
        return int(super().negotiate(opts))

    def header(self, name: str, value: str) -> int:
        self.fields.append(name)
        return int(Milter.CONTINUE)

    def eom(self) -> int:
        self.chgheader("Subject", 1, "")
        self.chgheader("X-Filtered-By", 1, "")
        if self.fields[-1] == "X-Fail":
            self._ctx.addheader("X-More", "than agreed")
        return int(Milter.CONTINUE)
