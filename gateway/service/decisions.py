"""What an administrator decided that holds for workers to come as well: state and weight of servers, the log level."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from gateway.service.channel import Json, Message

LASTING: Final = ("upstream", "log_level")


class Decisions:
    """The questions that decided something, each to be asked again of whoever was not there. Iterates over them."""

    def __init__(self) -> None:
        self._by_subject: dict[str, Message] = {}

    def note(self, message: Message, answers: Iterable[Json]) -> bool:
        """What came of a question; whether a worker carried out a decision, which replaces one on the same subject."""
        if message["name"] not in LASTING:
            return False
        if not any(isinstance(answer, Mapping) and not answer["error"] for answer in answers):
            return False
        self._by_subject[_subject(message)] = {**message, "id": 0}
        return True

    def __iter__(self) -> Iterator[Message]:
        return iter(tuple(self._by_subject.values()))


def _subject(message: Message) -> str:
    args = message["args"]
    assert isinstance(args, Mapping)
    subject = f"{message['name']} {args.get('pipeline')} {args.get('pool')} {args.get('server')}"
    return f"{subject} weight" if args.get("action") == "weight" else subject
