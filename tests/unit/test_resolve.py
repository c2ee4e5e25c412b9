"""The resolver: its rules one by one, and what holds for every policy, demand and set of backends."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dispatchers.interface import VadOptions
from policy.endpointing import Range, VadRules, settle
from policy.errors import Invalid, ModelNotFound, NotAllowed, NothingUp
from policy.policies import PolicyBody
from policy.resolve import FEATURES, Decision, Demand, Offer, resolve

OURS = Offer("self_hosted", ("small", "micro"), True, True, True, None, True)
RELAY = Offer("relay", ("nova", "small"), True, False, True, frozenset({"en", "de"}), True)
BOTH = PolicyBody(backends=("self_hosted", "relay"))
FILE = Demand("file")


def served(decision: Decision) -> list[tuple[str, str]]:
    return [(candidate.backend, candidate.model) for candidate in decision.candidates]


# --- one by one -------------------------------------------------------------------------------------------------------


def test_the_policys_order_is_the_order_tried() -> None:
    assert served(resolve(BOTH, FILE, [RELAY, OURS])) == [("self_hosted", "small"), ("relay", "nova")]
    relay_first = PolicyBody(backends=("relay", "self_hosted"))
    assert served(resolve(relay_first, FILE, [OURS, RELAY])) == [("relay", "nova"), ("self_hosted", "small")]


def test_what_was_never_up_is_down_and_not_without_the_model() -> None:
    unknown = replace(OURS, models=(), up=False)
    for demand in (FILE, Demand("stream", model="small")):
        with pytest.raises(NothingUp) as away:
            resolve(PolicyBody(), demand, [unknown])
        assert away.value.retry_after_s
    with pytest.raises(ModelNotFound):
        resolve(PolicyBody(), FILE, [replace(unknown, up=True)])


def test_a_preference_moves_its_backend_to_the_front() -> None:
    demand = Demand("file", backend_preference="prefer_relay")
    assert served(resolve(BOTH, demand, [OURS, RELAY])) == [("relay", "nova"), ("self_hosted", "small")]


def test_a_preference_cannot_bring_in_what_the_policy_forbids() -> None:
    decision = resolve(PolicyBody(), Demand("file", backend_preference="prefer_relay"), [OURS, RELAY])
    assert served(decision) == [("self_hosted", "small")]
    assert [(refusal.backend, refusal.reason) for refusal in decision.refused] == [
        ("relay", "The tenant's policy does not allow this backend.")
    ]


def test_what_a_session_asks_of_its_endpointing_stays_in_the_policys_range() -> None:
    rules = VadRules(silence_ms=Range[int](least=300, most=1_500), threshold=Range[float](default=0.4))
    policy = PolicyBody(vad=rules)
    assert resolve(policy, Demand("stream", vad={"silence_ms": 300, "threshold": 0.9}), [OURS])
    with pytest.raises(NotAllowed, match="from 300 to 1500") as refusal:
        resolve(policy, Demand("stream", vad={"silence_ms": 299}), [OURS])
    assert refusal.value.param == "vad.silence_ms"
    assert settle(rules, {"threshold": 0.5}) == {
        "threshold": 0.5, "silence_ms": 550, "min_speech_ms": 200, "max_utterance_ms": 30_000,
    }  # fmt: skip
    assert settle(rules, {})["threshold"] == 0.4
    assert settle(VadRules(silence_ms=Range[int](least=800)), {})["silence_ms"] == 800, "moved into the range"
    assert VadOptions(**settle(None, {})) == VadOptions()


def test_partials_come_of_the_policys_model_or_there_is_no_stream() -> None:
    assert served(resolve(PolicyBody(partial_model="micro"), Demand("stream"), [OURS])) == [("self_hosted", "small")]
    missing = PolicyBody(partial_model="tiny")
    with pytest.raises(NotAllowed, match="partials of the model `tiny`"):
        resolve(missing, Demand("stream"), [OURS])
    assert served(resolve(missing, FILE, [OURS])) == [("self_hosted", "small")]


def test_residency_overrules_the_list_of_backends() -> None:
    decision = resolve(replace_body(BOTH, forbid_relay=True), FILE, [OURS, RELAY])
    assert served(decision) == [("self_hosted", "small")]
    with pytest.raises(NotAllowed, match="inside this installation"):
        resolve(replace_body(BOTH, forbid_relay=True), Demand("file", model="nova"), [OURS, RELAY])


def test_a_named_model_goes_to_whoever_has_it() -> None:
    assert served(resolve(BOTH, Demand("file", model="nova"), [OURS, RELAY])) == [("relay", "nova")]
    assert served(resolve(BOTH, Demand("file", model="micro"), [OURS, RELAY])) == [("self_hosted", "micro")]


@pytest.mark.parametrize("model", [None, "", "whisper-1"])
def test_no_model_and_whisper_1_mean_the_tenants_default(model: str | None) -> None:
    policy = replace_body(BOTH, default_model="micro")
    assert served(resolve(policy, Demand("file", model=model), [OURS, RELAY])) == [("self_hosted", "micro")]


def test_the_default_of_a_backend_is_its_first_allowed_model() -> None:
    policy = replace_body(BOTH, models=("micro", "nova"))
    assert served(resolve(policy, FILE, [OURS, RELAY])) == [("self_hosted", "micro"), ("relay", "nova")]


def test_a_model_nobody_has_is_not_found_and_one_that_is_not_allowed_is_forbidden() -> None:
    with pytest.raises(ModelNotFound) as unknown:
        resolve(BOTH, Demand("file", model="gpt-9"), [OURS, RELAY])
    assert unknown.value.code == "MODEL_NOT_FOUND"
    with pytest.raises(NotAllowed, match="the model `small`"):
        resolve(PolicyBody(models=("micro",)), Demand("file", model="small"), [OURS])


def test_a_down_backend_is_passed_over_with_its_reason() -> None:
    decision = resolve(BOTH, FILE, [replace(OURS, up=False), RELAY])
    assert served(decision) == [("relay", "nova")]
    assert decision.refused[0].reason == "The backend is down."


def test_without_fallback_only_the_first_counts() -> None:
    policy = replace_body(BOTH, fallback=False)
    decision = resolve(policy, FILE, [OURS, RELAY])
    assert served(decision) == [("self_hosted", "small")]
    assert "no fallback" in decision.refused[0].reason
    with pytest.raises(NothingUp):
        resolve(policy, FILE, [replace(OURS, up=False), RELAY])


def test_nothing_up_is_retryable_and_says_when() -> None:
    with pytest.raises(NothingUp) as down:
        resolve(PolicyBody(), FILE, [replace(OURS, up=False)])
    assert (down.value.retryable, down.value.retry_after_s, down.value.code) == (True, 5, "BACKEND_UNAVAILABLE")
    with pytest.raises(NothingUp):
        resolve(PolicyBody(), FILE, [])


def test_what_a_backend_cannot_do_goes_to_the_one_that_can() -> None:
    demand = Demand("file", task="translate", backend_preference="prefer_relay")
    assert served(resolve(BOTH, demand, [OURS, RELAY])) == [("self_hosted", "small")]
    with pytest.raises(Invalid, match="does not support: translate"):
        resolve(PolicyBody(backends=("relay",)), demand, [OURS, RELAY])


def test_a_stream_needs_streaming() -> None:
    with pytest.raises(Invalid, match="streaming"):
        resolve(PolicyBody(), Demand("stream"), [replace(OURS, streaming=False)])
    with pytest.raises(NotAllowed, match="streaming"):
        resolve(PolicyBody(features=frozenset({"words"})), Demand("stream"), [OURS])


def test_languages_are_compared_by_their_primary_subtag() -> None:
    assert len(resolve(BOTH, Demand("file", language="en-GB"), [OURS, RELAY]).candidates) == 2
    assert served(resolve(BOTH, Demand("file", language="fr"), [OURS, RELAY])) == [("self_hosted", "small")]
    with pytest.raises(NotAllowed) as refused:
        resolve(PolicyBody(languages=("de",)), Demand("file", language="EN"), [OURS])
    assert refused.value.param == "language"


@pytest.mark.parametrize(
    ("kind", "limit"), [("file", "max_file_ms"), ("job", "max_file_ms"), ("stream", "max_stream_ms")]
)
def test_audio_may_be_as_long_as_the_policy_says_and_no_longer(kind: str, limit: str) -> None:
    policy = replace_body(PolicyBody(), **{limit: 60_000})
    demand = Demand(kind, audio_ms=60_000)  # type: ignore[arg-type]
    resolve(policy, demand, [OURS])
    with pytest.raises(Invalid, match="60001 ms"):
        resolve(policy, replace(demand, audio_ms=60_001), [OURS])


def test_an_unknown_feature_is_invalid() -> None:
    with pytest.raises(Invalid, match="telepathy"):
        resolve(PolicyBody(), Demand("file", features=frozenset({"telepathy"})), [OURS])


# --- for all ----------------------------------------------------------------------------------------------------------

T = TypeVar("T")
MODELS = ("small", "micro", "nova", "whisper-1")
LANGUAGES = ("en", "de", "fr")


def usually(common: T, *rare: T) -> st.SearchStrategy[T]:
    """Four times in five the common value: a demand with one difficulty says more than one with six."""
    return st.integers(0, 4).flatmap(lambda draw: st.sampled_from(rare) if draw == 0 else st.just(common))


some_models = usually(MODELS, MODELS[::-1], ("nova", "small"), ("micro", "whisper-1"), ("small",), ())
policies = st.builds(
    lambda default, models, **fields: PolicyBody(
        default_model=default if models is None or default in models else None, models=models, **fields
    ),
    default=usually(None, *MODELS),
    backends=st.sampled_from([("self_hosted", "relay"), ("relay", "self_hosted"), ("self_hosted",)]),
    forbid_relay=usually(False, True),
    fallback=usually(True, False),
    models=usually(None, MODELS, ("nova", "small"), ("micro",), ()),
    languages=usually(None, LANGUAGES, ("en", "de"), ("en",), ()),
    features=usually(None, FEATURES, *(FEATURES - {feature} for feature in sorted(FEATURES))),
)
demands = st.builds(
    Demand,
    kind=st.sampled_from(["file", "stream", "job"]),
    model=usually(None, *MODELS, "gpt-9"),
    language=usually(None, *LANGUAGES, "en-GB", "xx"),
    task=usually("transcribe", "translate"),
    backend_preference=st.sampled_from(["any", "prefer_self_hosted", "prefer_relay"]),
    features=usually(frozenset[str](), frozenset({"words"}), FEATURES, frozenset({"telepathy"})),
    audio_ms=usually(None, 0, 60_000, 20_000_000),
)
offers = st.sampled_from(
    [["self_hosted", "relay"], ["relay", "self_hosted"], ["relay", "unheard-of", "self_hosted"], ["self_hosted"], []]
).flatmap(lambda names: st.tuples(*(offered(name) for name in names)).map(list))


def offered(name: str) -> st.SearchStrategy[Offer]:
    return st.builds(
        Offer,
        backend=st.just(name),
        models=some_models,
        words=usually(True, False),
        translate=usually(True, False),
        streaming=usually(True, False),
        languages=usually(None, frozenset(LANGUAGES), frozenset({"en"}), frozenset()),
        up=usually(True, False),
    )


def replace_body(body: PolicyBody, **changes: object) -> PolicyBody:
    return PolicyBody.model_validate({**body.model_dump(), **changes})


def resolved(policy: PolicyBody, demand: Demand, plugged: list[Offer]) -> Decision | None:
    """None for the errors that `resolve` promises; any other error fails the test."""
    try:
        return resolve(policy, demand, plugged)
    except (Invalid, NotAllowed, ModelNotFound, NothingUp):
        return None


@given(policies, demands, offers)
def test_nothing_forbidden_incapable_or_down_ever_serves(
    policy: PolicyBody, demand: Demand, plugged: list[Offer]
) -> None:
    decision = resolved(policy, demand, plugged)
    assume(decision is not None)
    assert decision is not None
    assert decision.candidates
    by_name = {offer.backend: offer for offer in plugged}
    for candidate in decision.candidates:
        offer = by_name[candidate.backend]
        assert candidate.backend in policy.backends
        assert not (policy.forbid_relay and candidate.backend == "relay")
        assert policy.models is None or candidate.model in policy.models
        assert candidate.model in offer.models
        assert demand.model in (None, "whisper-1", candidate.model)
        assert offer.up
        assert policy.features is None or demand.needs() <= policy.features
        assert offer.streaming or demand.kind != "stream"
        assert offer.translate or demand.task != "translate"
        assert demand.language != "xx" or (offer.languages is None and policy.languages is None)
    assert policy.fallback or len(decision.candidates) == 1


@given(policies, demands, offers)
def test_every_offer_is_a_candidate_or_refused_with_a_reason(
    policy: PolicyBody, demand: Demand, plugged: list[Offer]
) -> None:
    decision = resolved(policy, demand, plugged)
    assume(decision is not None)
    assert decision is not None
    named = [entry.backend for entry in (*decision.candidates, *decision.refused)]
    assert sorted(named) == sorted(offer.backend for offer in plugged)
    assert all(entry.reason.endswith(".") for entry in (*decision.candidates, *decision.refused))


@given(policies, demands, offers)
def test_with_fallback_a_preference_only_reorders(policy: PolicyBody, demand: Demand, plugged: list[Offer]) -> None:
    policy = replace_body(policy, fallback=True)
    outcomes = set()
    for preference in ("any", "prefer_self_hosted", "prefer_relay"):
        decision = resolved(policy, replace(demand, backend_preference=preference), plugged)  # type: ignore[arg-type]
        outcomes.add(None if decision is None else frozenset(served(decision)))
    assert len(outcomes) == 1


@given(policies, demands, offers)
def test_the_order_in_which_backends_are_plugged_in_does_not_matter(
    policy: PolicyBody, demand: Demand, plugged: list[Offer]
) -> None:
    one, other = resolved(policy, demand, plugged), resolved(policy, demand, plugged[::-1])
    assert (one and one.candidates) == (other and other.candidates)


@given(policies, demands, offers)
def test_a_stored_decision_comes_back_as_it_was(policy: PolicyBody, demand: Demand, plugged: list[Offer]) -> None:
    decision = resolved(policy, demand, plugged)
    assume(decision is not None)
    assert decision is not None
    assert Decision.from_json(json.loads(json.dumps(decision.as_json()))) == decision
