"""The resolver: its rules one by one, and what holds for every policy, demand and set of backends."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dispatchers.interface import VadOptions
from policy.endpointing import Range, VadRules, settle
from policy.errors import Invalid, ModelNotFound, NoPrice, NotAllowed, NothingUp, PolicyError
from policy.policies import PolicyBody
from policy.pricing import Price, PriceList
from policy.resolve import FEATURES, Decision, Demand, Offer, permit, resolve
from runtime.ids import uuid7

OURS = Offer("self_hosted", ("small", "micro"), True, True, True, None, True)
RELAY = Offer("deepgram", ("nova", "small"), True, False, True, frozenset({"en", "de"}), True, kind="relay")
GROQ = replace(RELAY, backend="groq", models=("turbo",), region="us", longest_ms=600_000)
BOTH = PolicyBody(backends=("self_hosted", "relay"))
FILE = Demand("file")


def priced(*, currency: str = "USD", own: bool = False, **per_hour: int) -> PriceList:
    """A price for any model of each of these backends, in thousandths of a unit."""
    prices = {
        (own, backend, "*"): Price(uuid7(), backend, "*", thousandths * 1_000_000, 0, currency)
        for backend, thousandths in per_hour.items()
    }
    return PriceList(currency, prices)


def served(decision: Decision) -> list[tuple[str, str]]:
    return [(candidate.backend, candidate.model) for candidate in decision.candidates]


# --- one by one -------------------------------------------------------------------------------------------------------


def test_the_policys_order_is_the_order_tried() -> None:
    assert served(resolve(BOTH, FILE, [RELAY, OURS])) == [("self_hosted", "small"), ("deepgram", "nova")]
    relay_first = PolicyBody(backends=("relay", "self_hosted"))
    assert served(resolve(relay_first, FILE, [OURS, RELAY])) == [("deepgram", "nova"), ("self_hosted", "small")]


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
    assert served(resolve(BOTH, demand, [OURS, RELAY])) == [("deepgram", "nova"), ("self_hosted", "small")]


def test_a_preference_cannot_bring_in_what_the_policy_forbids() -> None:
    decision = resolve(PolicyBody(), Demand("file", backend_preference="prefer_relay"), [OURS, RELAY])
    assert served(decision) == [("self_hosted", "small")]
    assert [(refusal.backend, refusal.reason) for refusal in decision.refused] == [
        ("deepgram", "The tenant's policy does not allow this backend.")
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
    assert served(resolve(BOTH, Demand("file", model="nova"), [OURS, RELAY])) == [("deepgram", "nova")]
    assert served(resolve(BOTH, Demand("file", model="micro"), [OURS, RELAY])) == [("self_hosted", "micro")]


@pytest.mark.parametrize("model", [None, "", "whisper-1"])
def test_no_model_and_whisper_1_mean_the_tenants_default(model: str | None) -> None:
    policy = replace_body(BOTH, default_model="micro")
    assert served(resolve(policy, Demand("file", model=model), [OURS, RELAY])) == [("self_hosted", "micro")]


def test_the_default_of_a_backend_is_its_first_allowed_model() -> None:
    policy = replace_body(BOTH, models=("micro", "nova"))
    assert served(resolve(policy, FILE, [OURS, RELAY])) == [("self_hosted", "micro"), ("deepgram", "nova")]


def test_a_model_nobody_has_is_not_found_and_one_that_is_not_allowed_is_forbidden() -> None:
    with pytest.raises(ModelNotFound) as unknown:
        resolve(BOTH, Demand("file", model="gpt-9"), [OURS, RELAY])
    assert unknown.value.code == "MODEL_NOT_FOUND"
    with pytest.raises(NotAllowed, match="the model `small`"):
        resolve(PolicyBody(models=("micro",)), Demand("file", model="small"), [OURS])


def test_a_down_backend_is_passed_over_with_its_reason() -> None:
    decision = resolve(BOTH, FILE, [replace(OURS, up=False), RELAY])
    assert served(decision) == [("deepgram", "nova")]
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


def test_relay_means_every_relay_that_is_not_named_by_name() -> None:
    named = PolicyBody(backends=("groq", "self_hosted", "relay"))
    assisted = replace(RELAY, backend="assemblyai")
    plugged = [RELAY, OURS, GROQ, assisted]
    order = ["groq", "self_hosted", "assemblyai", "deepgram"]
    assert [backend for backend, _ in served(resolve(named, FILE, plugged))] == order
    only = PolicyBody(backends=("deepgram",))
    assert [backend for backend, _ in served(resolve(only, FILE, plugged))] == ["deepgram"]


def test_a_preference_is_for_a_kind_and_keeps_the_order_within_it() -> None:
    policy = PolicyBody(backends=("self_hosted", "groq", "deepgram"))
    demand = Demand("file", backend_preference="prefer_relay")
    assert [backend for backend, _ in served(resolve(policy, demand, [RELAY, OURS, GROQ]))] == [
        "groq", "deepgram", "self_hosted"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("regions", "where"),
    [
        (("here",), ["self_hosted"]),
        (("us",), ["groq"]),
        (("eu", "here"), ["self_hosted", "deepgram"]),
        (("eu-central",), ["deepgram"]),
    ],
)
def test_audio_goes_only_to_the_policys_regions_and_parts_of_them(regions: tuple[str, ...], where: list[str]) -> None:
    policy = replace_body(BOTH, regions=regions)
    plugged = [replace(OURS, region="here"), replace(RELAY, region="eu-central-1"), GROQ]
    assert [backend for backend, _ in served(resolve(policy, FILE, plugged))] == where


def test_a_region_is_no_prefix_and_what_says_none_is_nowhere_allowed() -> None:
    policy = replace_body(BOTH, regions=("eu",))
    for region in (None, "europe", "us-eu"):
        with pytest.raises(NotAllowed, match="allows only: eu"):
            resolve(policy, FILE, [replace(RELAY, region=region)])


def test_an_alias_leads_to_a_model_wherever_it_is_or_at_one_backend() -> None:
    policy = replace_body(BOTH, aliases={"best": "better", "better": "small", "theirs": "deepgram/small"})
    assert served(resolve(policy, Demand("file", model="best"), [OURS, RELAY])) == [
        ("self_hosted", "small"), ("deepgram", "small")
    ]  # fmt: skip
    decision = resolve(policy, Demand("file", model="theirs"), [OURS, RELAY])
    assert served(decision) == [("deepgram", "small")]
    assert "`deepgram`" in decision.refused[0].reason
    with pytest.raises(ModelNotFound):
        resolve(policy, Demand("file", model="deepgram/small"), [OURS, RELAY])  # callers choose no backend


def test_a_models_name_may_have_a_slash() -> None:
    vllm = replace(RELAY, backend="vllm", models=("openai/whisper", "small"))
    policy = replace_body(BOTH, aliases={"big": "openai/whisper", "there": "vllm/openai/whisper"})
    for name in ("openai/whisper", "big", "there"):
        assert served(resolve(policy, Demand("file", model=name), [OURS, vllm])) == [("vllm", "openai/whisper")]


def test_whisper_1_is_what_an_alias_makes_of_it() -> None:
    policy = replace_body(BOTH, default_model="small", aliases={"whisper-1": "micro"})
    assert served(resolve(policy, Demand("file", model="whisper-1"), [OURS, RELAY])) == [("self_hosted", "micro")]
    assert served(resolve(policy, FILE, [OURS, RELAY])) == [("self_hosted", "small"), ("deepgram", "small")]


def test_each_backend_may_have_models_of_its_own() -> None:
    policy = replace_body(BOTH, default_model="micro", backend_models={"relay": ["turbo", "small"]})
    assert served(resolve(policy, FILE, [OURS, RELAY, GROQ])) == [
        ("self_hosted", "micro"), ("deepgram", "small"), ("groq", "turbo")
    ]  # fmt: skip
    with pytest.raises(NotAllowed, match="the model `nova`"):
        resolve(policy, Demand("file", model="nova"), [OURS, RELAY, GROQ])


def test_what_has_no_price_is_refused_and_says_so() -> None:
    decision = resolve(BOTH, FILE, [OURS, RELAY], priced(deepgram=258))
    assert served(decision) == [("deepgram", "nova")]
    assert decision.refused[0].reason == "No price in USD is set for self_hosted with small, so it is not for sale."
    with pytest.raises(NoPrice, match="No price in USD is set for self_hosted"):
        resolve(PolicyBody(), FILE, [OURS], priced(deepgram=258))
    with pytest.raises(NothingUp):
        resolve(BOTH, FILE, [OURS, replace(RELAY, up=False)], priced(deepgram=258))


def test_a_price_above_the_ceiling_is_refused_to_the_nano() -> None:
    policy = replace_body(BOTH, max_price_per_hour="0.258")
    prices = priced(self_hosted=258, deepgram=259)
    decision = resolve(policy, FILE, [OURS, RELAY], prices)
    assert served(decision) == [("self_hosted", "small")]
    assert decision.refused[0].reason == "It costs 0.259000 USD an hour; the tenant's policy allows 0.258."
    with pytest.raises(NotAllowed, match=r"allows 0\.257999999"):
        resolve(replace_body(policy, max_price_per_hour="0.257999999"), FILE, [OURS, RELAY], prices)
    assert served(resolve(replace_body(policy, max_price_per_hour="0"), FILE, [OURS], priced(self_hosted=0)))


def test_a_price_of_the_tenants_own_or_of_the_very_model_comes_first() -> None:
    keys = [(True, "x", "m"), (True, "x", "*"), (False, "x", "m"), (False, "x", "*")]
    book = {key: Price(uuid7(), "x", key[2], nano, 0, "EUR") for nano, key in enumerate(keys)}
    for nano, key in enumerate(keys):
        found = PriceList("EUR", book).of("x", "m")
        assert found is not None
        assert found.price_nano_per_hour == nano
        del book[key]
    assert PriceList("EUR", book).of("x", "m") is None


def test_audio_longer_than_a_backend_takes_goes_elsewhere() -> None:
    policy = PolicyBody(backends=("groq", "self_hosted"))
    decision = resolve(policy, Demand("file", audio_ms=600_001), [OURS, GROQ])
    assert [backend for backend, _ in served(decision)] == ["self_hosted"]
    assert decision.refused[0].reason == "The backend takes at most 600000 ms of audio at once."
    assert len(resolve(policy, Demand("file", audio_ms=600_000), [OURS, GROQ]).candidates) == 2
    job = Demand("job", audio_ms=7_200_000)  # goes there in pieces
    assert len(resolve(policy, job, [OURS, GROQ]).candidates) == 2
    with pytest.raises(Invalid, match="at most 60000 ms"):
        resolve(policy, job, [replace(GROQ, longest_ms=60_000)])


def test_speakers_are_a_feature_that_a_backend_has_or_has_not() -> None:
    demand = Demand("file", features=frozenset({"speakers"}))
    assert served(resolve(BOTH, demand, [OURS, replace(RELAY, speakers=True)])) == [("deepgram", "nova")]
    with pytest.raises(Invalid, match="does not support: speakers"):
        resolve(BOTH, demand, [OURS, RELAY])


def test_what_is_down_says_why_and_when_it_may_be_back() -> None:
    away = replace(OURS, up=False, why_down="The engine is being started.", back_in_s=7.5)
    throttled = replace(RELAY, up=False, why_down="The provider asks for a pause.", back_in_s=2.5)
    assert resolve(BOTH, FILE, [away, RELAY]).refused[0].reason == "The engine is being started."
    with pytest.raises(NothingUp) as down:
        resolve(BOTH, FILE, [away, throttled])
    assert down.value.retry_after_s == 2.5


@pytest.mark.parametrize(
    "later",
    [
        {"backends": ["relay"]},
        {"regions": ["eu"]},
        {"models": ["micro"]},
        {"backend_models": {"self_hosted": ["micro"]}},
        {"features": ["words"]},
        {"languages": ["de"]},
    ],
)
def test_what_runs_may_go_on_as_long_as_later_policies_allow_it(later: dict[str, object]) -> None:
    ours, running = replace(OURS, region="here"), Demand("stream", language="en", vad={"silence_ms": 300})
    permit(PolicyBody(max_stream_ms=1, max_price_per_hour="0", default_model="micro"), running, ours, "small")
    with pytest.raises(NotAllowed):
        permit(replace_body(BOTH, **later), running, ours, "small")


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
    lambda default, models, aliases, **fields: PolicyBody(
        default_model=default if models is None or default in models else None,
        models=models,
        aliases=aliases if models is None else {},
        **fields,
    ),
    aliases=usually({}, {"gpt-9": "small"}, {"gpt-9": "deepgram/nova"}, {"nova": "small", "whisper-1": "nova"}),
    default=usually(None, *MODELS),
    backends=st.sampled_from(
        [("self_hosted", "relay"), ("groq", "self_hosted", "relay"), ("self_hosted", "deepgram"), ("self_hosted",)]
    ),
    regions=usually(None, ("here",), ("eu",), ("eu", "us", "here")),
    max_price_per_hour=usually(None, "0", "0.1", "5"),
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
    [["self_hosted", "deepgram"], ["groq", "deepgram", "self_hosted"], ["groq", "unheard-of"], ["self_hosted"], []]
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
        kind=st.just("self_hosted" if name == "self_hosted" else "relay"),
        region=usually("eu-central-1", "here", "us", None),
        longest_ms=usually(None, 30_000),
    )


price_lists = st.none() | st.fixed_dictionaries(
    {},
    optional={name.replace("-", "_"): st.sampled_from([0, 100, 6_000]) for name in ("self_hosted", "deepgram", "groq")},
).map(lambda thousandths: priced(**thousandths))


def replace_body(body: PolicyBody, **changes: object) -> PolicyBody:
    return PolicyBody.model_validate({**body.model_dump(), **changes})


def resolved(
    policy: PolicyBody, demand: Demand, plugged: list[Offer], prices: PriceList | None = None
) -> Decision | None:
    """None for the errors that `resolve` promises; any other error fails the test."""
    try:
        return resolve(policy, demand, plugged, prices)
    except (Invalid, NotAllowed, ModelNotFound, NoPrice, NothingUp):
        return None


sparse = settings(suppress_health_check=[HealthCheck.filter_too_much])
"""Of policies, demands and offers drawn at random many give no decision."""


@sparse
@given(policies, demands, offers, price_lists)
def test_nothing_forbidden_incapable_unsold_or_down_ever_serves(
    policy: PolicyBody, demand: Demand, plugged: list[Offer], prices: PriceList | None
) -> None:
    decision = resolved(policy, demand, plugged, prices)
    assume(decision is not None)
    assert decision is not None
    assert decision.candidates
    by_name = {offer.backend: offer for offer in plugged}
    for candidate in decision.candidates:
        offer = by_name[candidate.backend]
        assert candidate.backend in policy.backends or (offer.kind == "relay" and "relay" in policy.backends)
        assert not (policy.forbid_relay and offer.kind == "relay")
        assert policy.regions is None or (offer.region or "").split("-")[0] in policy.regions
        assert policy.models is None or candidate.model in policy.models
        assert candidate.model in offer.models
        assert demand.model in (None, "whisper-1", candidate.model) or demand.model in policy.aliases
        assert offer.up
        assert policy.features is None or demand.needs() <= policy.features
        assert offer.streaming or demand.kind != "stream"
        assert offer.translate or demand.task != "translate"
        assert demand.language != "xx" or (offer.languages is None and policy.languages is None)
        assert offer.longest_ms is None or (demand.audio_ms or 0) <= offer.longest_ms
        if prices is not None:
            price = prices.of(candidate.backend, candidate.model)
            assert price is not None
            ceiling = policy.max_price_nano_per_hour
            assert ceiling is None or price.price_nano_per_hour <= ceiling
    assert policy.fallback or len(decision.candidates) == 1


@sparse
@given(policies, demands, offers)
def test_candidates_stand_in_the_policys_order_the_preferred_kind_first(
    policy: PolicyBody, demand: Demand, plugged: list[Offer]
) -> None:
    decision = resolved(policy, demand, plugged)
    assume(decision is not None)
    assert decision is not None
    kinds = {offer.backend: offer.kind for offer in plugged}
    preferred = demand.backend_preference.removeprefix("prefer_")

    def standing(backend: str) -> tuple[bool, int, str]:
        named = backend if backend in policy.backends else "relay"
        return kinds[backend] != preferred, policy.backends.index(named), backend

    standings = [standing(candidate.backend) for candidate in decision.candidates]
    assert standings == sorted(standings)


@sparse
@given(policies, demands, offers, price_lists)
def test_every_offer_is_a_candidate_or_refused_with_a_reason(
    policy: PolicyBody, demand: Demand, plugged: list[Offer], prices: PriceList | None
) -> None:
    decision = resolved(policy, demand, plugged, prices)
    assume(decision is not None)
    assert decision is not None
    named = [entry.backend for entry in (*decision.candidates, *decision.refused)]
    assert sorted(named) == sorted(offer.backend for offer in plugged)
    assert all(entry.reason.endswith(".") for entry in (*decision.candidates, *decision.refused))


@sparse
@given(policies, demands, offers)
def test_with_fallback_a_preference_only_reorders(policy: PolicyBody, demand: Demand, plugged: list[Offer]) -> None:
    policy = replace_body(policy, fallback=True)
    outcomes = set()
    for preference in ("any", "prefer_self_hosted", "prefer_relay"):
        decision = resolved(policy, replace(demand, backend_preference=preference), plugged)  # type: ignore[arg-type]
        outcomes.add(None if decision is None else frozenset(served(decision)))
    assert len(outcomes) == 1


@sparse
@given(policies, demands, offers, price_lists)
def test_the_same_question_has_the_same_answer_in_whatever_order_backends_are_plugged_in(
    policy: PolicyBody, demand: Demand, plugged: list[Offer], prices: PriceList | None
) -> None:
    def answer(offered: list[Offer]) -> object:
        try:
            return resolve(policy, demand, offered, prices)
        except PolicyError as refusal:
            return type(refusal), refusal.message, refusal.param, refusal.retry_after_s

    assert answer(plugged) == answer(plugged) == answer(plugged[::-1])


@sparse
@given(policies, demands, offers)
def test_a_stored_decision_comes_back_as_it_was(policy: PolicyBody, demand: Demand, plugged: list[Offer]) -> None:
    decision = resolved(policy, demand, plugged)
    assume(decision is not None)
    assert decision is not None
    assert Decision.from_json(json.loads(json.dumps(decision.as_json()))) == decision
