"""Endpointing: how far a tenant's live sessions may set it, and what they get where they set nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from policy.errors import NotAllowed

Number = TypeVar("Number", int, float)


class Span(NamedTuple):
    """What a value may be, and what it is where nobody says."""

    least: float
    most: float
    default: float


WIDEST: Mapping[str, Span] = {
    "threshold": Span(0.1, 0.9, 0.6),
    "silence_ms": Span(100, 5_000, 550),
    "min_speech_ms": Span(100, 2_000, 200),
    "max_utterance_ms": Span(1_000, 30_000, 30_000),
}
"""What the installation allows: speech probability, and durations in ms."""


class Range(BaseModel, Generic[Number]):
    """A policy's narrower range. None: as the installation has it; a default is moved into the range if need be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    least: Number | None = None
    most: Number | None = None
    default: Number | None = None

    def within(self, widest: Span) -> Span:
        least = widest.least if self.least is None else self.least
        most = widest.most if self.most is None else self.most
        return Span(least, most, min(max(widest.default, least), most) if self.default is None else self.default)


class VadRules(BaseModel):
    """By the names of `start`'s `vad`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Range[float] = Range[float]()
    silence_ms: Range[int] = Range[int]()
    min_speech_ms: Range[int] = Range[int]()
    max_utterance_ms: Range[int] = Range[int]()

    @model_validator(mode="after")
    def _within_the_widest(self) -> VadRules:
        for name, widest in WIDEST.items():
            span = self.span(name)
            if not widest.least <= span.least <= span.default <= span.most <= widest.most:
                raise ValueError(f"{name} must have least ≤ default ≤ most within {widest.least} to {widest.most}")
        return self

    def span(self, name: str) -> Span:
        rule: Range[Any] = getattr(self, name)
        return rule.within(WIDEST[name])


def settle(rules: VadRules | None, asked: Mapping[str, float]) -> dict[str, Any]:
    """Every value of a session that asks for these. Raises `NotAllowed`, which tells the range."""
    settled = {}
    for name, widest in WIDEST.items():
        span = widest if rules is None else rules.span(name)
        value = asked.get(name, span.default)
        if not span.least <= value <= span.most:
            raise NotAllowed(
                f"The tenant's policy allows `vad.{name}` from {span.least} to {span.most}.", param=f"vad.{name}"
            )
        settled[name] = value
    return settled
