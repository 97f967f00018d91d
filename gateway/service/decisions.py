"""What an administrator decided that holds for workers to come as well: state and weight of servers, the log level."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        done = [answer["result"] for answer in answers if isinstance(answer, Mapping) and not answer["error"]]
        for decision in _decided(message, done[0]) if done else ():
            subject = _subject(decision)
            self._by_subject.pop(subject, None)  # the last one decides
            self._by_subject[subject] = decision
        return bool(done)

    def __iter__(self) -> Iterator[Message]:
        return iter(tuple(self._by_subject.values()))


def _decided(message: Message, result: Json) -> list[Message]:
    """With the server and the pipelines that were meant, however they had been written."""
    args = message["args"]
    assert isinstance(args, Mapping)
    if not isinstance(result, Mapping) or not isinstance(pipelines := result.get("pipelines"), Sequence):
        return [{**message, "id": 0}]
    return [
        {**message, "id": 0, "args": {**args, "server": result["server"], "pipeline": pipeline}}
        for pipeline in pipelines
    ]


def _subject(message: Message) -> str:
    args = message["args"]
    assert isinstance(args, Mapping)
    subject = f"{message['name']} {args.get('pipeline')} {args.get('pool')} {args.get('server')}"
    return f"{subject} weight" if args.get("action") == "weight" else subject
