"""Choose the pool of upstream servers by rules over what is known of the session and the message.

The rules are tried in their order and the first that holds decides; `default` is for the rest. Without a `default`
what no rule fits goes on to the next `route` stage, at last to the pool of `splice`; where that names none either,
the mail is refused with 451 4.4.4.

Asked at the earliest moment at which the facts of all rules are known: rules over `client`, `tls`, `helo`, `auth` need
no more than the first MAIL; those over `rcpt` wait for the first recipient, and a later recipient of another pool gets
452 4.5.3 and comes in a transaction of its own. Costs one evaluation a rule; has no helper that could be down.

    stages:
      - route:
          rules:
            - {when: 'auth.domain == "vip.example.org"', to: vip}
            - {when: 'listed("paid", auth.user)', to: paid}
          default: mta
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway import Condition, Kind, PoolReference, Recipient, Session, Settings, Stage, Upstream


class Rule(BaseModel):
    """One rule: a condition and the pool for what it fits."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    when: Condition = Field(description="What the rule fits.")
    to: PoolReference = Field(description="Pool of what it fits.")


class RouteSettings(Settings):
    """The rules, and where the rest goes."""

    short_form: ClassVar[str | None] = "default"

    rules: tuple[Rule, ...] = Field((), description="Conditions and their pools; the first that holds decides.")
    default: PoolReference | None = Field(None, description="Pool of what no rule fits.")

    @model_validator(mode="after")
    def _routes_something(self) -> Self:
        if not self.rules and self.default is None:
            raise ValueError("routes nothing; write rules or a default")
        return self


class Route(Stage):
    """Choose the pool of upstream servers by rules."""

    Settings = RouteSettings
    kind = Kind.PLUMBING
    decides_identity = True
    settings: RouteSettings

    def __init__(self, settings: RouteSettings) -> None:
        super().__init__(settings)
        self._rules = [(rule.when, Upstream(str(rule.to))) for rule in settings.rules]
        self._default = Upstream(str(settings.default)) if settings.default is not None else None

    def phases(self) -> Sequence[str]:
        """Asked only where to go."""
        return ["route"]

    def route(self, session: Session, recipient: Recipient | None) -> Upstream | None:
        """The pool of the first rule that holds."""
        for when, upstream in self._rules:
            if when.evaluate(session, session.transaction, recipient):
                return upstream
        return self._default
