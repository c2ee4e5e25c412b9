"""The policy document: what it accepts, and that it comes back from its stored form as it was."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from policy.policies import PolicyBody

FEATURES = ("words", "translate", "streaming", "speakers")


def test_the_default_keeps_audio_on_our_own_engine() -> None:
    body = PolicyBody()
    assert body.backends == ("self_hosted",)
    assert body.models is None
    assert body.features is None
    assert body.max_streams == 8


@pytest.mark.parametrize(
    "bad",
    [
        {"backends": []},
        {"backends": ["self_hosted", "self_hosted"]},
        {"backends": ["the moon"]},
        {"backends": ["relay"], "forbid_relay": True},
        {"models": ["a", "a"]},
        {"models": [""]},
        {"models": ["a"], "default_model": "b"},
        {"languages": ["English"]},
        {"features": ["telepathy"]},
        {"max_streams": -1},
        {"max_file_ms": 0},
        {"requests_per_minute": 0},
        {"max_stream": 8},
        {"models": ["a"], "partial_model": "b"},
        {"max_speaking": 0},
        {"vad": {"colour": {"least": 1}}},
        {"vad": {"silence_ms": {"least": 99}}},
        {"vad": {"silence_ms": {"most": 5_001}}},
        {"vad": {"silence_ms": {"least": 400, "most": 300}}},
        {"vad": {"silence_ms": {"least": 400, "default": 300}}},
        {"vad": {"silence_ms": {"least": 300.5}}},
        {"vad": {"threshold": {"most": 0.5, "default": 0.6}}},
        {"backends": ["Deepgram"]},
        {"backends": ["deepgram", "groq"], "forbid_relay": True},
        {"regions": []},
        {"regions": ["EU"]},
        {"aliases": {"a": "a"}},
        {"aliases": {"a": "b", "b": "c", "c": "a"}},
        {"aliases": {"a": ""}},
        {"aliases": {"best": "large"}, "models": ["small"]},
        {"aliases": {"best": "self_hosted/small"}, "backends": ["relay"]},
        {"default_model": "best", "aliases": {"best": "large"}, "models": ["best"]},
        {"backend_models": {"deepgram": ["nova-3"]}},
        {"backend_models": {"self_hosted": []}},
        {"backend_models": {"self_hosted": ["small"]}, "models": ["micro"]},
        {"max_price_per_hour": 0.25},
        {"max_price_per_hour": "-1"},
        {"max_price_per_hour": "1e3"},
        {"max_price_per_hour": "0.0000000001"},
        {"max_price_per_hour": "NaN"},
        {"max_job_ms": 0},
        {"max_streams": 10**16},
        {"requests_per_minute": 10**400},
        {"models": ["a\x00"]},
        {"aliases": {"a\n": "b"}},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PolicyBody.model_validate(bad)


def test_a_policy_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        PolicyBody().max_streams = 9  # type: ignore[misc]


def test_a_body_of_the_first_release_is_read_with_the_defaults_of_what_came_later() -> None:
    stored = """{"backends":["self_hosted","relay"],"forbid_relay":false,"fallback":true,"default_model":null,
        "models":["micro"],"partial_model":null,"languages":null,"features":["words"],"max_streams":8,
        "max_speaking":null,"max_requests":16,"requests_per_minute":600,"max_file_ms":1000,"max_stream_ms":14400000,
        "vad":null,"max_upload_bytes":null,"job_threshold_bytes":null,"job_threshold_ms":null,"keep_transcripts":true,
        "keep_audio":false,"audio_ttl_s":2592000}"""
    body = PolicyBody.model_validate_json(stored)
    assert (body.aliases, body.backend_models, body.regions, body.max_price_nano_per_hour) == ({}, {}, None, None)
    assert (body.longest_ms("file"), body.longest_ms("job")) == (1000, 1000)


def test_a_job_may_be_longer_than_what_a_caller_waits_for() -> None:
    body = PolicyBody(max_file_ms=1, max_job_ms=3, max_stream_ms=2)
    assert [body.longest_ms(kind) for kind in ("file", "stream", "job")] == [1, 2, 3]


@given(st.integers(0, 999_999_999), st.integers(0, 999_999_999))
def test_a_ceiling_is_exact_to_the_nano(units: int, nanos: int) -> None:
    assert PolicyBody(max_price_per_hour=f"{units}.{nanos:09d}").max_price_nano_per_hour == units * 10**9 + nanos


@given(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("abcdef"), max_size=6))
def test_aliases_lead_to_a_model_or_are_refused(aliases: dict[str, str]) -> None:
    try:
        body = PolicyBody(aliases=aliases)
    except ValidationError:
        goes_round = [name for name in aliases if name in _following(aliases, name)]
        assert goes_round
    else:
        assert all(body.target(name) not in aliases for name in aliases)


def _following(aliases: dict[str, str], name: str) -> list[str]:
    """Where so many steps lead."""
    steps = [name]
    for _ in aliases:
        steps.append(aliases.get(steps[-1], ""))
    return steps[1:]


@given(
    backends=st.permutations(["self_hosted", "groq", "relay"]),
    features=st.none() | st.frozensets(st.sampled_from(FEATURES)),
    languages=st.none() | st.lists(st.sampled_from(["en", "de", "fr", "yue"]), unique=True),
    streams=st.integers(0, 1000),
)
def test_what_is_stored_is_what_comes_back(
    backends: list[str], features: frozenset[str] | None, languages: list[str] | None, streams: int
) -> None:
    body = PolicyBody.model_validate(
        {"backends": backends, "features": features, "languages": languages, "max_streams": streams}
    )
    stored = body.model_dump_json()
    assert PolicyBody.model_validate_json(stored) == body
    assert PolicyBody.model_validate_json(stored).model_dump_json() == stored
