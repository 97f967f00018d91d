"""Write docs/metrics.md from the table of metrics (`make docs`). A test compares what is committed with it."""

from __future__ import annotations

import sys
from pathlib import Path

from gateway.observe.metrics import LABELS, METRICS
from scripts.reference import code, page, table

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"

METRICS_TEXT = """
`metrics: HOST:PORT` serves them to Prometheus at `/metrics`; the admin socket does too. They count for the service as a
whole: all workers, those of earlier configurations that still have sessions, and those that died. Counters begin at 0
when the service is started, and never fall while it runs. A series is there once it was counted, or once the pipeline
that it belongs to is served; counters without labels, reloads and restarts of workers are there from the start. Seconds
and octets are whole units; sums of seconds have microseconds.
"""

LABELS_TEXT = """
A label means the same wherever it occurs. Each has few values, which are names in the configuration or stand here:
nothing that a client says becomes a label.
"""


def metrics() -> str:
    """The page."""
    rows = (
        [code(name), metric.type, ", ".join(code(label) for label in metric.labels), metric.help]
        for name, metric in METRICS.items()
    )
    return page(
        "Metrics",
        METRICS_TEXT,
        table(["name", "type", "labels", "meaning"], rows),
        "## Labels",
        LABELS_TEXT,
        table(["label", "values"], ([code(label), text] for label, text in LABELS.items())),
        "## Buckets",
        table(
            ["histogram", "ends of its buckets, in seconds"],
            (
                [code(name), ", ".join(f"{bound:g}" for bound in metric.bounds)]
                for name, metric in METRICS.items()
                if metric.bounds
            ),
        ),
    )


def main() -> int:
    PAGE.write_text(metrics())
    return 0


if __name__ == "__main__":
    sys.exit(main())
