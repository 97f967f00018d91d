"""`gateway check FILE...`: validate, and print each chain as a small table."""

from __future__ import annotations

import click

from gateway.cli.loading import plans
from gateway.pipeline.plan import Plan, Row


@click.command()
@click.argument("paths", nargs=-1, required=True)
def command(paths: tuple[str, ...]) -> None:
    """Validate files and folders as `gateway run` would; print each pipeline's chain and grade.

    Each problem is a line file:line:column on standard error; the exit status is 2 then.
    """
    compiled, _ = plans(paths)
    for plan in compiled:
        click.echo(table(plan))


def table(plan: Plan) -> str:
    """The chain of a plan as text."""
    head = Row("stage", "kind", "phases", "when", "mode", "provides", "requires")
    rows = [head, *plan.rows]
    fields = ["stage", "kind", "phases", "when", "mode", "provides", "requires"]
    used = [
        name
        for name in fields
        if name in ("stage", "kind", "phases", "mode") or any(getattr(r, name) for r in plan.rows)
    ]
    widths = {name: max(len(getattr(row, name)) for row in rows) for name in used}
    lines = [f"pipeline {plan.name}: {', '.join(listener.url for listener in plan.listeners)}"]
    for row in rows:
        lines.append("  " + "  ".join(f"{getattr(row, name):<{widths[name]}}" for name in used).rstrip())
    lines.append(f"  grade: {plan.grade} ({plan.reason})")
    for name, pool in plan.pools.items():
        lines.append(f"  upstream {name}: {', '.join(url for url, _ in pool.servers)}")
    lines += [f"  warning: {text}" for text in plan.warnings]
    return "\n".join(lines)
