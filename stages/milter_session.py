"""What is known of a session and of a message with a filter behind a socket: what it was told, what it said so far."""

from __future__ import annotations

from gateway import Edits, FilterConnection, Refuse, Reply
from gateway.protocol import milter
from stages.filter_words import refusal


class Filter:
    """What a session has of its filter. `helo`: the name that it was told last, and whether inside of TLS.

    `over`: the filter's word at CONNECT or HELO for all that follows.
    """

    def __init__(self) -> None:
        self.connection: FilterConnection | None = None
        self.helo: tuple[str, bool] | None = None
        self.over: milter.Verdict | None = None

    def answer(self, verdict: milter.Verdict) -> None:
        """Take in what it said of the client."""
        if not isinstance(verdict, (milter.Continue, milter.Skip)):
            self.over = verdict


class Asked:
    """What was said of one message. `over`: the filter wants to hear no more of it; `lost`: why it cannot."""

    def __init__(self) -> None:
        self.begun = False
        self.over = False
        self.discard = False
        self.lost = ""
        self.edits: Edits = "any"
        self.told: set[str] = set()
        self.refused: list[tuple[str, Reply]] = []

    @property
    def listens(self) -> bool:
        """Whether the filter wants to hear more of it."""
        return self.begun and not self.over and not self.discard

    def answer(self, verdict: milter.Verdict, *, ends: bool) -> Refuse | None:
        """Take in what it said of the message; `ends`: a refusal is for all of it."""
        if isinstance(verdict, milter.Accept):
            self.over = True
        elif isinstance(verdict, milter.Discard):
            self.discard = True
        refuse = refusal(verdict)
        self.over = self.over or (ends and refuse is not None)
        return refuse
