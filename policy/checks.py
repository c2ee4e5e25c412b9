"""A draft of a policy, checked before it is put: against the rules of the document, and against what there is here.

Every problem names its field and the remedy; all of them are told at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from policy import relays
from policy.errors import Invalid
from policy.objections import forbidden, meaning
from policy.policies import RELAYS, PolicyBody
from policy.relays import Relay
from policy.resolve import Offer
from runtime.database import Transaction


@dataclass(frozen=True)
class Problem:
    """What is wrong with a field, and what would not be."""

    field: str
    reason: str


def read(draft: Mapping[str, Any] | str) -> tuple[PolicyBody | None, tuple[Problem, ...]]:
    """The body, from an object or JSON, or what keeps it from being one."""
    written = draft if isinstance(draft, str) else json.dumps(draft)
    try:
        return PolicyBody.model_validate_json(written, strict=True), ()
    except ValidationError as error:
        return None, tuple(_problem(wrong) for wrong in error.errors(include_url=False, include_input=False))


def misfits(body: PolicyBody, offers: Sequence[Offer]) -> tuple[Problem, ...]:
    """What a body says that cannot be meant here, where there are these (`known`): backends and models that there are
    not, rules that leave nothing. An offer without models is one whose models are not known."""
    unknown = (*_unknown_backends(body, offers), *_unknown_models(body, offers))
    return unknown or tuple(_nothing_left(body, offers))


def require_fit(draft: Mapping[str, Any] | str, offers: Sequence[Offer]) -> PolicyBody:
    """The body, if it may be put. Raises `Invalid`, which tells every problem and names the first one's field."""
    body, problems = read(draft)
    problems = problems if body is None else misfits(body, offers)
    if body is None or problems:
        told = " ".join(f"`{problem.field}`: {problem.reason}" for problem in problems)
        raise Invalid(f"The policy was not accepted. {told}", param=problems[0].field)
    return body


async def known(tx_system: Transaction, plugged: Sequence[Offer]) -> tuple[Offer, ...]:
    """What is plugged in, and every other relay that the operator has an account with: it may be plugged in later."""
    there = {offer.backend for offer in plugged}
    others = [record.relay for record in await relays.listing(tx_system) if record.relay.name not in there]
    return (*plugged, *(_unplugged(relay) for relay in others))


def _unplugged(relay: Relay) -> Offer:
    return Offer(
        backend=relay.name,
        models=relay.models or (),
        words=True,
        translate=True,
        streaming=True,
        languages=None,
        up=False,
        kind="relay",
        region=relay.region,
    )


def _problem(wrong: ErrorDetails) -> Problem:
    where = ".".join(str(part) for part in wrong["loc"] if part != "[key]") or "body"
    if wrong["type"] == "extra_forbidden" and len(wrong["loc"]) == 1:
        near = get_close_matches(where, PolicyBody.model_fields, n=1)
        meant = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(PolicyBody.model_fields)}."
        return Problem(where[:64], f"There is no such field; {meant}")
    reason = wrong["msg"].removeprefix("Value error, ")
    if where == "body" and (field := reason.split(maxsplit=1)[0].partition(".")[0]) in PolicyBody.model_fields:
        where = field
    return Problem(where[:200], f"{reason}.")


def _unknown_backends(body: PolicyBody, offers: Sequence[Offer]) -> Iterator[Problem]:
    there = sorted(offer.backend for offer in offers)
    for field, names in (("backends", body.backends), ("backend_models", body.backend_models)):
        for name in names:
            if name not in (*there, RELAYS):
                known = ", ".join((*there, f"{RELAYS} (every relay not named otherwise)"))
                yield Problem(field, f"There is no backend `{name}` here; there are: {known}.")


def _unknown_models(body: PolicyBody, offers: Sequence[Offer]) -> Iterator[Problem]:
    """Models that no backend has that may be meant, as far as their models are known."""
    for field, name, backend in _named(body, {offer.backend for offer in offers}):
        meant = [offer for offer in offers if backend in (None, offer.backend, _relays(offer))]
        there = sorted({model for offer in meant for model in offer.models})
        if name not in there and all(offer.models for offer in meant):
            where = "here" if backend is None else f"at `{backend}`"
            yield Problem(field, f"There is no model `{name}` {where}; there are: {', '.join(there) or 'none'}.")


def _named(body: PolicyBody, backends: Set[str]) -> Iterator[tuple[str, str, str | None]]:
    """Every model that the body names: by which field, and of which backend, None: of any."""
    yield from (("models", model, None) for model in body.models or ())
    for backend, models in body.backend_models.items():
        yield from ((f"backend_models.{backend}", model, backend) for model in models)
    if body.partial_model is not None:
        yield "partial_model", body.partial_model, None
    names = {} if body.default_model is None else {"default_model": body.default_model}
    for field, name in [*names.items(), *((f"aliases.{alias}", alias) for alias in body.aliases)]:
        yield (field, *meaning(body, name, backends))


def _nothing_left(body: PolicyBody, offers: Sequence[Offer]) -> Iterator[Problem]:
    """Rules that exclude one another, so that no request could ever be served."""
    reasons: list[str] = []
    for offer in offers:
        noes = [forbidden(body, offer, model) for model in offer.models]
        if not offer.models or not all(noes):
            return
        reasons.extend(f"`{offer.backend}`: {no.reason}" for no in noes[:1] if no is not None)
    yield Problem("body", f"It leaves no backend and model to serve a request. {' '.join(reasons)}")


def _relays(offer: Offer) -> str | None:
    return RELAYS if offer.kind == "relay" else offer.backend
