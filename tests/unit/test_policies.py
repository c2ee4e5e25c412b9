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
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PolicyBody.model_validate(bad)


def test_a_policy_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        PolicyBody().max_streams = 9  # type: ignore[misc]


@given(
    backends=st.permutations(["self_hosted", "relay"]),
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
