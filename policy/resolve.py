"""Where a request may run: a pure function of policy, demand, what is plugged in and what it costs.

The caller's preference is a hint that reorders; the policy has the last word. The decision names every backend, the
refused ones with their reason, and is stored with the session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from policy.errors import Invalid, ModelNotFound, NoPrice, NotAllowed, NothingUp, PolicyError
from policy.objections import (
    FEATURES,
    Meant,
    No,
    absence,
    check_allowed,
    check_demand,
    cost,
    forbidden,
    meaning,
    objection,
)
from policy.policies import Kind, PolicyBody
from policy.pricing import PriceList

__all__ = [
    "FEATURES",
    "TENANTS_DEFAULT",
    "Candidate",
    "Decision",
    "Demand",
    "Offer",
    "Preference",
    "Refusal",
    "permit",
    "resolve",
]

TENANTS_DEFAULT = "whisper-1"
"""The name by which OpenAI clients, which must name a model, mean the tenant's default."""

RETRY_AFTER_S = 5

Preference: TypeAlias = Literal["any", "prefer_self_hosted", "prefer_relay"]


@dataclass(frozen=True)
class Demand:
    """What a caller asks for. `features` come on top of those that `kind` and `task` imply; `vad` is what is asked of
    the endpointing, by name (`policy.endpointing`). `channels`: how many are recognised, each for itself."""

    kind: Kind
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
    goes, None: not said; `longest_ms` of audio it takes at once, None: any; `why_down` is for people; `back_in_s`: when
    to try one that is down again, None: not known."""

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
    back_in_s: float | None = None


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


def resolve(policy: PolicyBody, demand: Demand, offers: Sequence[Offer], prices: PriceList | None = None) -> Decision:
    """The backends that may serve this demand, in order. `prices` None: nothing is refused for what it costs.

    Raises `Invalid` (nothing allowed can do it), `NotAllowed` (policy forbids it), `ModelNotFound` (no backend has the
    model), `NoPrice` (what is allowed is not for sale), `NothingUp` (what is allowed is down).
    """
    check_demand(policy, demand)
    candidates: list[Candidate] = []
    refused: list[Refusal] = []
    noes: list[No] = []
    asked, default = _named(policy, demand, offers)
    for offer in sorted(offers, key=lambda offer: _place(policy, demand, offer)):
        meant = asked or _default(policy, default, offer)
        chosen = bool(candidates) or any(no.error is NothingUp for no in noes)
        no = (
            objection(policy, demand, offer, meant)
            or cost(policy, offer, meant.model, prices)
            or absence(policy, offer, chosen=chosen)
        )
        if no is None:
            candidates.append(Candidate(offer.backend, meant.model, _standing(demand, offer, chosen=chosen)))
        else:
            refused.append(Refusal(offer.backend, meant.model, no.reason))
            noes.append(no)
    if not candidates:
        raise _nothing(noes)
    return Decision(tuple(candidates), tuple(refused))


def permit(policy: PolicyBody, demand: Demand, offer: Offer, model: str) -> None:
    """For what runs already, under a policy that came later. Raises `NotAllowed` where that one does not let the demand
    go on there. Limits and prices are those that it began with."""
    check_allowed(policy, demand)
    if (no := forbidden(policy, offer, model)) is not None:
        raise NotAllowed(no.reason)


# --- the order --------------------------------------------------------------------------------------------------------


def _place(policy: PolicyBody, demand: Demand, offer: Offer) -> tuple[bool, int, str]:
    """Sorts the preferred kind first, then by the policy's order, then whatever the policy does not name; by name where
    that leaves a choice."""
    place = policy.place(offer.backend)
    return not _is_preferred(demand, offer), len(policy.backends) if place is None else place, offer.backend


def _is_preferred(demand: Demand, offer: Offer) -> bool:
    return demand.backend_preference == f"prefer_{offer.kind}"


def _standing(demand: Demand, offer: Offer, *, chosen: bool) -> str:
    if _is_preferred(demand, offer):
        return "The caller prefers it and the tenant's policy allows it."
    if chosen:
        return "It is the next one that the tenant's policy allows."
    return "It comes first in the tenant's policy among those that can serve this request."


# --- the model --------------------------------------------------------------------------------------------------------


def _named(policy: PolicyBody, demand: Demand, offers: Sequence[Offer]) -> tuple[Meant | None, Meant | None]:
    """What the caller names, and what the policy names for callers who name nothing."""
    backends = {*policy.backends, *(offer.backend for offer in offers)}

    def meant(name: str | None) -> Meant | None:
        unnamed = not name or (name == TENANTS_DEFAULT and name not in policy.aliases)
        return None if unnamed or name is None else meaning(policy, name, backends)

    return meant(demand.model), meant(policy.default_model)


def _default(policy: PolicyBody, default: Meant | None, offer: Offer) -> Meant:
    """The model this offer serves with where none is named: the first of the policy's list for it, the tenant's
    default, or its own first allowed one. Empty where it has none."""
    own = policy.models_of(offer.backend)
    if own is None and default is not None:
        return default
    allowed = [model for model in own or offer.models if model in offer.models and policy.allows(model, offer.backend)]
    return Meant(next(iter(allowed or own or offer.models), ""))


# --- what is raised ---------------------------------------------------------------------------------------------------


def _nothing(noes: Sequence[No]) -> PolicyError:
    """The error nearest to success: down, then not for sale, then unable, then forbidden, then unknown."""
    errors = {no.error for no in noes}
    if not noes or NothingUp in errors:
        waits = [no.back_in_s for no in noes if no.back_in_s is not None]
        return NothingUp(retry_after_s=min(waits, default=RETRY_AFTER_S))
    if errors == {ModelNotFound}:
        return ModelNotFound(param="model")
    error = next(error for error in (NoPrice, Invalid, NotAllowed) if error in errors)
    return error(" ".join(dict.fromkeys(no.reason for no in noes if no.error is error)))
