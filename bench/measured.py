"""A job that nginx and the gateway do in turn, some rounds each after one warm-up.

CPU is what the kernel charged their processes; the ratio is that of the medians.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.peers import Process


@dataclass
class Measured:
    """One job's figures."""

    name: str
    asked: float | None
    unit: str
    nginx: list[float] = field(default_factory=list)
    gateway: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Gateway / nginx, of the medians."""
        return median(self.gateway) / median(self.nginx)

    def row(self) -> str:
        """A row of a table: both figures, the range, the ratio asked for and the ratio."""
        return (
            f"| {self.name} | {self.unit} | {median(self.nginx):.3f} | {median(self.gateway):.3f} "
            f"({min(self.gateway):.3f} to {max(self.gateway):.3f}) | {self.asked or 'none'} | **{self.ratio:.2f}** |"
        )


def job(
    name: str, asked: float | None, unit: str, per: float, peers: list[tuple[Process, Callable[[], None]]], rounds: int
) -> Measured:
    """Run the same job at both, in turn; figures are CPU seconds times `per`."""
    measured = Measured(name, asked, unit)
    for turn in range(rounds + 1):
        for (process, run), figures in zip(peers, (measured.nginx, measured.gateway), strict=True):
            before = process.cpu()
            run()
            if turn:
                figures.append((process.cpu() - before) * per)
    print(
        f"{name}: nginx {median(measured.nginx):.3f} {unit}, gateway {median(measured.gateway):.3f} {unit}, "
        f"ratio {measured.ratio:.2f} (asked {asked or 'none'})",
        flush=True,
    )
    return measured


def machine() -> str:
    """Processor, architecture, kernel."""
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    return f"{cpu}, {platform.machine()}, Linux {platform.release().split('-')[0]}"
