from __future__ import annotations

import pytest
from pydantic import ValidationError

from gateway.facts import PoolName
from stages.splice import Splice, SpliceSettings


def test_settings() -> None:
    settings = SpliceSettings.model_validate({"pool": "mta", "handoff": "never"})
    assert isinstance(settings.pool, PoolName) and settings.pool == "mta"
    assert SpliceSettings().pool is None and SpliceSettings().handoff == "auto"
    assert SpliceSettings.short_form == "pool"
    with pytest.raises(ValidationError):
        SpliceSettings.model_validate({"handoff": "sometimes"})


def test_is_terminal() -> None:
    assert Splice.terminal and Splice.decides_identity
