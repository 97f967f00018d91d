"""How name servers are asked."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from gateway.config.base import Findings, Model
from gateway.values import Duration


class ResolverSettings(Model):
    """How the pipeline's name servers are asked."""

    timeout: Duration = Field(5.0, gt=0, description="For one question with all its tries.")
    valid: Duration | None = Field(None, description="How long an answer is believed, instead of its own TTL.")
    ipv4: bool = Field(True, description="Look for IPv4 addresses of names (A records).")
    ipv6: bool = Field(True, description="Look for IPv6 addresses of names (AAAA records).")

    @model_validator(mode="after")
    def _one_family(self) -> Self:
        if not self.ipv4 and not self.ipv6:
            findings = Findings()
            findings.add(("ipv6",), None, "without ipv4 and ipv6 no address can be found", "leave one of them on")
            findings.report(self)
        return self
