"""A worker as a process: its sessions, what the other processes tell it, and what it tells them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

from gateway.observe import metrics
from gateway.observe.counters import CounterRow
from gateway.service import certificates
from gateway.service.answers import AnswerError, Answers
from gateway.service.channel import Channel, Json, Message
from gateway.service.child import Child, files_of
from gateway.service.worker import ServedPipeline, Worker

log = structlog.get_logger("gateway.worker")

Teller = Callable[[dict[str, Json]], None]


class WorkerProcess(Child):
    """One worker; the one with number 0 watches the upstreams, for all."""

    def __init__(self, worker: Worker, channel: Channel, row: CounterRow, drain: float) -> None:
        super().__init__(channel, row, drain)
        self.worker = worker
        self._answers = Answers(worker)
        self._contexts = certificates.server_contexts(pipeline.plan for pipeline in worker.pipelines)

    async def prepare(self) -> None:
        """The worker's own; then what it learns goes to the others."""
        await self.worker.prepare()
        for pipeline in self.worker.pipelines:
            assert pipeline.served is not None
            for name, pool in pipeline.served.pools.items():
                pool.news = _teller(self.channel, pipeline.plan.name, name)
        metrics.gauge("gateway_workers").set(1)

    async def accept(self) -> None:
        """Open the doors."""
        await self.worker.accept()

    async def close(self) -> None:
        """Drain. Clients whose connection waits to be accepted are not reset where nobody will listen any more: at a
        stop, and where the next configuration has another listener."""
        if self.grace:
            await self.worker.accept_waiting()
        await self.worker.close(self.grace)

    def hurry(self) -> None:
        """A second signal to stop."""
        self.worker.hurry()

    def heard(self, message: Message) -> None:
        """News of upstreams, renewed certificates, questions."""
        match message["op"]:
            case "news":
                pipeline = self._pipeline(message["pipeline"])
                news = message["news"]
                if pipeline is not None and pipeline.served is not None and isinstance(news, dict):
                    pool = pipeline.served.pools.get(str(message["pool"]))
                    if pool is not None:
                        pool.apply(news)
            case "files":
                certificates.renew(self._contexts, files_of(message), quiet=True)
            case "ask":
                args = message["args"]
                self.answer(message["id"], self._answered(str(message["name"]), args))

    async def _answered(self, name: str, args: Json) -> Json:
        assert isinstance(args, Mapping)
        try:
            return {"result": await self._answers.answer(name, args), "error": ""}
        except AnswerError as error:
            return {"result": None, "error": str(error)}
        except Exception as error:
            log.exception("internal_error", error=f"{name}: {type(error).__name__}: {error}")
            return {"result": None, "error": f"500 {type(error).__name__} in the worker; its log says more"}

    def _pipeline(self, name: Json) -> ServedPipeline | None:
        return next((one for one in self.worker.pipelines if one.plan.name == name), None)


def _teller(channel: Channel, pipeline: str, pool: str) -> Teller:
    return lambda news: channel.send({"op": "news", "pipeline": pipeline, "pool": pool, "news": news})
