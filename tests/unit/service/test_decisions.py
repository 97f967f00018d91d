"""What an administrator decided, as it is told to workers to come."""

from __future__ import annotations

from gateway.service.channel import Json, Message
from gateway.service.decisions import Decisions

URL = "smtp://192.0.2.1:25"


def upstream(server: str, action: str, weight: int | None = None, pipeline: str = "") -> Message:
    args: Message = {"pool": "mta", "server": server, "action": action, "weight": weight, "pipeline": pipeline}
    return {"op": "ask", "id": 7, "to": "workers", "name": "upstream", "args": args}


def done(*pipelines: str, error: str = "") -> list[Json]:
    """The answer of a worker."""
    result: Message = {"pool": "mta", "server": URL, "pipelines": list(pipelines)}
    return [{"worker": 0, "result": None if error else result, "error": error}]


def told(decisions: Decisions) -> list[tuple[object, ...]]:
    found = []
    for message in decisions:
        args = message["args"]
        assert isinstance(args, dict) and message["id"] == 0
        found.append((args["pipeline"], args["server"], args["action"], args["weight"]))
    return found


def test_the_last_word_on_a_server_counts_however_it_was_written() -> None:
    decisions = Decisions()
    for server, action in (("192.0.2.1", "drain"), (URL, "ready"), ("192.0.2.1:25", "drain")):
        assert decisions.note(upstream(server, action), done("mx"))
    assert told(decisions) == [("mx", URL, "drain", None)]


def test_weights_are_beside_states_and_pipelines_beside_each_other() -> None:
    decisions = Decisions()
    decisions.note(upstream(URL, "drain"), done("mx", "submission"))
    decisions.note(upstream(URL, "weight", 3, "mx"), done("mx"))
    decisions.note(upstream(URL, "ready", pipeline="mx"), done("mx"))
    assert told(decisions) == [
        ("submission", URL, "drain", None), ("mx", URL, "weight", 3), ("mx", URL, "ready", None),
    ]  # fmt: skip


def test_what_decides_nothing() -> None:
    decisions = Decisions()
    assert not decisions.note(upstream("x", "drain"), done(error="404 no server x"))
    assert not decisions.note({"op": "ask", "id": 1, "name": "sessions", "args": {}}, done("mx"))
    assert decisions.note({"op": "ask", "id": 1, "name": "log_level", "args": {"level": "debug"}},
                          [{"result": "debug", "error": ""}])  # fmt: skip
    assert [message["args"] for message in decisions] == [{"level": "debug"}]
