"""Join the client to the chosen upstream server: the last stage of every pipeline.

It is asked in no phase. Its settings say where mail goes that no stage routed, and from when on the gateway
stops reading the conversation (architecture, "Three grades"):

- `auto` (default): as soon as no stage needs more, if the upstream trusts the gateway with nothing that the
  client would inherit;
- `always`: as `auto`, but even then; `gateway check` warns;
- `never`: every command is read and relayed by itself.

Costs nothing by itself; it has no helper that could be down.

    stages:
      - splice: mta          # the pool where nothing routed
      - splice: {pool: mta, handoff: never}
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from gateway import Kind, PoolReference, Settings, Stage


def _pass(value: object) -> object:
    return "always" if value is True else "never" if value is False else value


class SpliceSettings(Settings):
    """Where unrouted mail goes, and when the conversation is handed off."""

    short_form: ClassVar[str | None] = "pool"

    pool: PoolReference | None = Field(
        None, description="Pool of what no stage routed; may be left out where there is only one pool."
    )
    handoff: Literal["auto", "always", "never"] = Field(
        "auto", description="When the gateway stops reading: once nothing more is needed, always then, or never."
    )
    pass_error_message: Annotated[Literal["auto", "always", "never"], BeforeValidator(_pass)] = Field(
        "auto",
        description="Whose words a client reads when the upstream refuses it: ours but where they judge the client "
        "(auto), the upstream's own of any refusal (always, on), or ours of any (never, off).",
    )


class Splice(Stage):
    """Join the client to the chosen upstream server."""

    Settings = SpliceSettings
    kind = Kind.PLUMBING
    terminal = True
    decides_identity = True
