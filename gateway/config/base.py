"""What all models of the configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from gateway.config.problems import Loc


class Model(BaseModel):
    """Unknown keys are errors, values do not change after the load."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, validate_default=False)


class Findings:
    """What a model finds at its settings after all of them were read; raised together."""

    def __init__(self) -> None:
        self._details: list[InitErrorDetails] = []

    def add(self, loc: Loc, value: object, text: str, suggestion: str) -> None:
        """Note something at `loc` within the model; `suggestion` says what to write."""
        error = PydanticCustomError("pipeline", "{text}; {suggestion}", {"text": text, "suggestion": suggestion})
        self._details.append(InitErrorDetails(type=error, loc=loc, input=value))

    def report(self, model: BaseModel) -> None:
        """Raises ValidationError if there is anything."""
        if self._details:
            raise ValidationError.from_exception_data(type(model).__name__, self._details)


def as_url(value: object) -> object:
    """`- smtp://...` is short for `- {url: smtp://...}`."""
    return value if isinstance(value, (dict, BaseModel)) else {"url": value}
