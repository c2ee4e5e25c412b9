"""Why a demand is refused, or a backend does not serve it: one rule a function, each with its reason in words."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

from policy.endpointing import settle
from policy.errors import Invalid, ModelNotFound, NoPrice, NotAllowed, NothingUp, PolicyError
from policy.policies import RELAYS, PolicyBody
from policy.pricing import PriceList, show_nano

if TYPE_CHECKING:
    from policy.resolve import Demand, Offer

FEATURES = frozenset({"words", "translate", "streaming", "speakers"})
PIECE_MS = 300_000
"""A job reaches its backend in pieces of about so much audio."""


class No(NamedTuple):
    """Why an offer does not serve. `NothingUp` means that it could and may, but not now."""

    error: type[PolicyError]
    reason: str
    back_in_s: float | None = None


class Meant(NamedTuple):
    """The model that a name leads to; `backend` None: wherever it is."""

    model: str
    backend: str | None = None


def meaning(policy: PolicyBody, name: str, backends: Set[str]) -> Meant:
    """What a model's name leads to: itself, or where an alias leads. Of `backend/model`, which a model's name may look
    like, the former must be one of these backends."""
    target = policy.target(name)
    backend, _, model = target.partition("/")
    pinned = name in policy.aliases and model and backend in backends and backend != RELAYS
    return Meant(model, backend) if pinned else Meant(target)


def check_demand(policy: PolicyBody, demand: Demand) -> None:
    """What needs no backend to be refused."""
    if unknown := demand.needs() - FEATURES:
        raise Invalid(f"Unknown features: {', '.join(sorted(unknown))}.", param="features")
    check_allowed(policy, demand)
    settle(policy.vad, demand.vad)
    limit_ms = policy.longest_ms(demand.kind)
    if demand.audio_ms is not None and demand.audio_ms > limit_ms:
        raise Invalid(
            f"The audio is {demand.audio_ms} ms long; the tenant's policy allows {limit_ms} ms.", param="file"
        )


def check_allowed(policy: PolicyBody, demand: Demand) -> None:
    if policy.features is not None and (forbidden := demand.needs() - policy.features):
        raise NotAllowed(f"The tenant's policy does not allow: {', '.join(sorted(forbidden))}.")
    language = _primary(demand.language)
    if language is not None and policy.languages is not None and language not in policy.languages:
        raise NotAllowed(
            f"The tenant's policy allows only these languages: {', '.join(policy.languages)}.", param="language"
        )


def objection(policy: PolicyBody, demand: Demand, offer: Offer, meant: Meant) -> No | None:
    """Why this offer can or may never serve this demand."""
    model = meant.model
    if meant.backend not in (None, offer.backend):
        return No(ModelNotFound, f"The tenant's policy means the model `{model}` of the backend `{meant.backend}`.")
    unknown = not offer.models and not offer.up  # until it is up for the first time
    if model not in offer.models and not unknown:
        return No(ModelNotFound, f"The backend has no model `{model}`." if model else "The backend has no model.")
    return forbidden(policy, offer, model) or _inability(policy, demand, offer)


def forbidden(policy: PolicyBody, offer: Offer, model: str) -> No | None:
    """Why the policy alone keeps the model of this offer from serving."""
    if policy.place(offer.backend) is None:
        return No(NotAllowed, "The tenant's policy does not allow this backend.")
    if policy.forbid_relay and offer.kind != "self_hosted":
        return No(NotAllowed, "The tenant's policy keeps audio inside this installation.")
    if policy.regions is not None and not _lies_in(offer.region, policy.regions):
        where = "nobody knows where" if offer.region is None else f"`{offer.region}`"
        regions = ", ".join(policy.regions)
        return No(NotAllowed, f"Its audio goes to {where}; the tenant's policy allows only: {regions}.")
    if not policy.allows(model, offer.backend):
        return No(NotAllowed, f"The tenant's policy does not allow the model `{model}`.")
    return None


def _inability(policy: PolicyBody, demand: Demand, offer: Offer) -> No | None:
    """Why this offer cannot do what is asked."""
    if demand.kind == "stream" and policy.partial_model is not None and policy.partial_model not in offer.models:
        return No(
            NotAllowed,
            f"The tenant's policy wants partials of the model `{policy.partial_model}`, which the backend has not.",
        )
    abilities = {
        "words": offer.words,
        "translate": offer.translate,
        "streaming": offer.streaming,
        "speakers": offer.speakers,
    }
    if missing := [feature for feature in sorted(demand.needs()) if not abilities[feature]]:
        return No(Invalid, f"The backend does not support: {', '.join(missing)}.")
    language = _primary(demand.language)
    if language is not None and offer.languages is not None and language not in offer.languages:
        return No(Invalid, f"The backend does not know the language `{language}`.")
    at_once_ms = min(demand.audio_ms or 0, PIECE_MS) if demand.kind == "job" else demand.audio_ms or 0
    if offer.longest_ms is not None and at_once_ms > offer.longest_ms:
        return No(Invalid, f"The backend takes at most {offer.longest_ms} ms of audio at once.")
    return None


def cost(policy: PolicyBody, offer: Offer, model: str, prices: PriceList | None) -> No | None:
    """Why this offer is not for sale, or too dear."""
    if prices is None:
        return None
    price = prices.of(offer.backend, model)
    if price is None:
        return No(
            NoPrice, f"No price in {prices.currency} is set for {offer.backend} with {model}, so it is not for sale."
        )
    ceiling = policy.max_price_nano_per_hour
    if ceiling is not None and price.price_nano_per_hour > ceiling:
        asked = f"{show_nano(price.price_nano_per_hour)} {prices.currency} an hour"
        return No(NotAllowed, f"It costs {asked}; the tenant's policy allows {policy.max_price_per_hour}.")
    return None


def absence(policy: PolicyBody, offer: Offer, *, chosen: bool) -> No | None:
    """Why this offer, which could and may serve, does not now. `chosen`: one before it could and may, too."""
    if chosen and not policy.fallback:
        return No(NothingUp, "The tenant's policy allows no fallback from the backend before it.")
    if not offer.up:
        return No(NothingUp, offer.why_down, offer.back_in_s)
    return None


def _lies_in(region: str | None, regions: Sequence[str]) -> bool:
    """Whether a region is one of these or part of one: `eu-central-1` is part of `eu`."""
    return region is not None and any(f"{region.lower()}-".startswith(f"{allowed}-") for allowed in regions)


def _primary(language: str | None) -> str | None:
    """The primary subtag of a BCP 47 tag, which is how backends and policies name languages: `en` of `en-GB`."""
    return language.split("-")[0].lower() if language else None
