"""Where a request may run: a pure function of policy, demand and what is plugged in.

The caller's preference is a hint that reorders; the policy has the last word. The decision names every backend, the
refused ones with their reason, and is stored with the session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from policy.endpointing import settle
from policy.errors import Invalid, ModelNotFound, NotAllowed, NothingUp, PolicyError
from policy.policies import PolicyBody

TENANTS_DEFAULT = "whisper-1"
"""The name by which OpenAI clients, which must name a model, mean the tenant's default."""

FEATURES = frozenset({"words", "translate", "streaming", "speakers"})
RETRY_AFTER_S = 5

Preference: TypeAlias = Literal["any", "prefer_self_hosted", "prefer_relay"]


@dataclass(frozen=True)
class Demand:
    """What a caller asks for. `features` come on top of those that `kind` and `task` imply; `vad` is what is asked of
    the endpointing, by name (`policy.endpointing`). `channels`: how many are recognised, each for itself."""

    kind: Literal["file", "stream", "job"]
    model: str | None = None
    language: str | None = None
    task: Literal["transcribe", "translate"] = "transcribe"
    backend_preference: Preference = "any"
    features: frozenset[str] = frozenset()
    audio_ms: int | None = None
    channels: int = 1
    vad: Mapping[str, float] = field(default_factory=dict)
    customer: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""

    def needs(self) -> frozenset[str]:
        """Every feature this takes."""
        implied = {"streaming"} if self.kind == "stream" else set()
        return self.features | implied | ({"translate"} if self.task == "translate" else set())


@dataclass(frozen=True)
class Offer:
    """What a plugged-in backend can do; its default model comes first. `languages` None: any. `region` is where audio
    goes, None: not said; `longest_ms` of audio it takes at once, None: any; `why_down` is for people."""

    backend: str
    models: tuple[str, ...]
    words: bool
    translate: bool
    streaming: bool
    languages: frozenset[str] | None
    up: bool
    kind: Literal["self_hosted", "relay"] = "self_hosted"
    region: str | None = None
    speakers: bool = False
    longest_ms: int | None = None
    why_down: str = "The backend is down."


@dataclass(frozen=True)
class Candidate:
    """A backend and model that may serve, and why it stands where it stands."""

    backend: str
    model: str
    reason: str


@dataclass(frozen=True)
class Refusal:
    """A backend that may not, or cannot, and why. `model` is empty where the backend has none."""

    backend: str
    model: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """Candidates in the order to try them; at least one. Every offer is in one of the two lists."""

    candidates: tuple[Candidate, ...]
    refused: tuple[Refusal, ...]

    def as_json(self) -> dict[str, Any]:
        """The stored form."""
        return {
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "refused": [asdict(refusal) for refusal in self.refused],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Decision:
        """The inverse of `as_json`."""
        return cls(
            tuple(Candidate(**candidate) for candidate in stored["candidates"]),
            tuple(Refusal(**refusal) for refusal in stored["refused"]),
        )


class _No(NamedTuple):
    """Why an offer does not serve. `NothingUp` means that it could and may, but not now."""

    error: type[PolicyError]
    reason: str


def resolve(policy: PolicyBody, demand: Demand, offers: Sequence[Offer]) -> Decision:
    """The backends that may serve this demand, in order.

    Raises `Invalid` (nothing allowed can do it), `NotAllowed` (policy forbids it), `ModelNotFound` (no backend has the
    model), `NothingUp` (what is allowed is down).
    """
    _check_demand(policy, demand)
    candidates: list[Candidate] = []
    refused: list[Refusal] = []
    noes: list[_No] = []
    for offer in sorted(offers, key=lambda offer: _place(policy, demand, offer)):
        model = _model(policy, demand, offer)
        chosen = bool(candidates) or any(no.error is NothingUp for no in noes)
        no = _objection(policy, demand, offer, model) or _absence(policy, offer, chosen=chosen)
        if no is None:
            candidates.append(Candidate(offer.backend, model, _standing(demand, offer, chosen=chosen)))
        else:
            refused.append(Refusal(offer.backend, model, no.reason))
            noes.append(no)
    if not candidates:
        raise _nothing(noes)
    return Decision(tuple(candidates), tuple(refused))


def _check_demand(policy: PolicyBody, demand: Demand) -> None:
    """What needs no backend to be refused."""
    needs = demand.needs()
    if unknown := needs - FEATURES:
        raise Invalid(f"Unknown features: {', '.join(sorted(unknown))}.", param="features")
    if policy.features is not None and (forbidden := needs - policy.features):
        raise NotAllowed(f"The tenant's policy does not allow: {', '.join(sorted(forbidden))}.")
    language = _primary(demand.language)
    if language is not None and policy.languages is not None and language not in policy.languages:
        raise NotAllowed(
            f"The tenant's policy allows only these languages: {', '.join(policy.languages)}.", param="language"
        )
    settle(policy.vad, demand.vad)
    limit_ms = policy.max_stream_ms if demand.kind == "stream" else policy.max_file_ms
    if demand.audio_ms is not None and demand.audio_ms > limit_ms:
        raise Invalid(
            f"The audio is {demand.audio_ms} ms long; the tenant's policy allows {limit_ms} ms.", param="file"
        )


def _place(policy: PolicyBody, demand: Demand, offer: Offer) -> tuple[bool, int]:
    """Sorts the preferred backend first, then by the policy's order, then whatever the policy does not name."""
    order: tuple[str, ...] = policy.backends
    return not _is_preferred(demand, offer), order.index(offer.backend) if offer.backend in order else len(order)


def _is_preferred(demand: Demand, offer: Offer) -> bool:
    return demand.backend_preference == f"prefer_{offer.backend}"


def _model(policy: PolicyBody, demand: Demand, offer: Offer) -> str:
    """The model this offer would serve with: the one asked for, the tenant's default, or the offer's first allowed one.
    Empty when there is none."""
    asked = demand.model if demand.model != TENANTS_DEFAULT else None
    named = asked or policy.default_model
    if named is not None:
        return named
    allowed = [model for model in offer.models if policy.models is None or model in policy.models]
    return next(iter(allowed or offer.models), "")


def _objection(policy: PolicyBody, demand: Demand, offer: Offer, model: str) -> _No | None:
    """Why this offer can or may never serve this demand."""
    unknown = not offer.models and not offer.up  # until it is up for the first time
    if model not in offer.models and not unknown:
        return _No(ModelNotFound, f"The backend has no model `{model}`." if model else "The backend has no model.")
    if offer.backend not in policy.backends:
        return _No(NotAllowed, "The tenant's policy does not allow this backend.")
    if policy.forbid_relay and offer.backend != "self_hosted":
        return _No(NotAllowed, "The tenant's policy keeps audio inside this installation.")
    if policy.models is not None and model not in policy.models:
        return _No(NotAllowed, f"The tenant's policy does not allow the model `{model}`.")
    if demand.kind == "stream" and policy.partial_model is not None and policy.partial_model not in offer.models:
        return _No(
            NotAllowed,
            f"The tenant's policy wants partials of the model `{policy.partial_model}`, which the backend has not.",
        )
    abilities = {"words": offer.words, "translate": offer.translate, "streaming": offer.streaming}
    if missing := [feature for feature in sorted(demand.needs()) if not abilities.get(feature, False)]:
        return _No(Invalid, f"The backend does not support: {', '.join(missing)}.")
    language = _primary(demand.language)
    if language is not None and offer.languages is not None and language not in offer.languages:
        return _No(Invalid, f"The backend does not know the language `{language}`.")
    return None


def _absence(policy: PolicyBody, offer: Offer, *, chosen: bool) -> _No | None:
    """Why this offer, which could and may serve, does not now. `chosen`: one before it could and may, too."""
    if chosen and not policy.fallback:
        return _No(NothingUp, "The tenant's policy allows no fallback from the backend before it.")
    if not offer.up:
        return _No(NothingUp, "The backend is down.")
    return None


def _standing(demand: Demand, offer: Offer, *, chosen: bool) -> str:
    if _is_preferred(demand, offer):
        return "The caller prefers it and the tenant's policy allows it."
    if chosen:
        return "It is the next one that the tenant's policy allows."
    return "It comes first in the tenant's policy among those that can serve this request."


def _nothing(noes: Sequence[_No]) -> PolicyError:
    """The error nearest to success: down, then unable, then forbidden, then unknown."""
    errors = {no.error for no in noes}
    if not noes or NothingUp in errors:
        return NothingUp(retry_after_s=RETRY_AFTER_S)
    if errors == {ModelNotFound}:
        return ModelNotFound(param="model")
    error = Invalid if Invalid in errors else NotAllowed
    return error(" ".join(dict.fromkeys(no.reason for no in noes if no.error is error)))


def _primary(language: str | None) -> str | None:
    """The primary subtag of a BCP 47 tag, which is how backends and policies name languages: `en` of `en-GB`."""
    return language.split("-")[0].lower() if language else None
