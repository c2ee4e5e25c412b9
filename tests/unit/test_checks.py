"""A draft of a policy against what there is: every problem by its field, with what would be right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from policy.checks import misfits, read, require_fit
from policy.errors import Invalid
from policy.resolve import Offer

OURS = Offer("self_hosted", ("small", "micro"), True, True, True, None, True, region="here")
DEEPGRAM = Offer("deepgram", ("nova-3",), True, False, True, None, True, kind="relay", region="us")
OFFERS = (OURS, DEEPGRAM)


def problems(draft: dict[str, Any], offers: tuple[Offer, ...] = OFFERS) -> list[tuple[str, str]]:
    body, found = read(draft)
    found = found if body is None else misfits(body, offers)
    return [(problem.field, problem.reason) for problem in found]


@pytest.mark.parametrize(
    "draft",
    [
        {},
        {"backends": ["self_hosted", "relay"]},
        {"backends": ["deepgram", "self_hosted"], "models": ["nova-3", "micro"], "default_model": "micro"},
        {"backends": ["self_hosted", "relay"], "backend_models": {"relay": ["nova-3"], "self_hosted": ["micro"]}},
        {"aliases": {"best": "better", "better": "small"}, "default_model": "best"},
        {"backends": ["deepgram"], "aliases": {"best": "deepgram/nova-3"}},
        {"backends": ["self_hosted", "deepgram"], "regions": ["us"]},
    ],
)
def test_what_makes_sense_here_passes(draft: dict[str, Any]) -> None:
    assert problems(draft) == []
    assert require_fit(draft, OFFERS)


@pytest.mark.parametrize(
    ("draft", "field", "told"),
    [
        ({"backends": ["deepgrm"]}, "backends", "no backend `deepgrm` here; there are: deepgram, self_hosted, relay"),
        ({"backends": []}, "backends", "at least 1 item"),
        ({"models": ["smal"]}, "models", "no model `smal` here; there are: micro, nova-3, small"),
        ({"default_model": "large"}, "default_model", "no model `large`"),
        ({"partial_model": "tiny"}, "partial_model", "no model `tiny`"),
        ({"aliases": {"best": "large"}}, "aliases.best", "no model `large`"),
        (
            {"backends": ["self_hosted", "deepgram"], "aliases": {"best": "deepgram/small"}},
            "aliases.best", "no model `small` at `deepgram`; there are: nova-3",
        ),
        ({"backend_models": {"self_hosted": ["nova-3"]}}, "backend_models.self_hosted", "`nova-3` at `self_hosted`"),
        ({"aliases": {"a": "b", "b": "a"}}, "aliases", "a → b → a"),
        ({"max_stream": 3}, "max_stream", "did you mean `max_streams`?"),
        ({"max_streams": "3"}, "max_streams", "valid integer"),
        ({"max_streams": True}, "max_streams", "valid integer"),
        ({"default_model": "a", "models": ["b"]}, "default_model", "not among models"),
        ({"regions": ["mars"]}, "body", "`self_hosted`: Its audio goes to `here`"),
        ({"backends": ["deepgram"], "models": ["small"]}, "body", "leaves no backend and model"),
    ],
)  # fmt: skip
def test_what_does_not_is_told_by_field_with_the_remedy(draft: dict[str, Any], field: str, told: str) -> None:
    found = problems(draft)
    assert [name for name, _ in found] == [field]
    assert told in found[0][1]
    with pytest.raises(Invalid) as refused:
        require_fit(draft, OFFERS)
    assert refused.value.param == field
    assert told in refused.value.message


def test_everything_that_is_wrong_is_told_at_once() -> None:
    draft = {"backends": ["a", "b"], "models": ["c"], "default_model": "c"}
    assert [field for field, _ in problems(draft)] == ["backends", "backends", "models", "default_model"]
    assert [field for field, _ in problems({"max_streams": -1, "languages": ["?"]})] == ["languages.0", "max_streams"]


def test_models_that_are_not_known_are_not_denied() -> None:
    unknown = replace(DEEPGRAM, models=())
    assert problems({"models": ["anything"]}, (OURS, unknown)) == []
    assert problems({"backends": ["deepgram"], "aliases": {"a": "deepgram/x"}}, (OURS, unknown)) == []
    assert [field for field, _ in problems({"aliases": {"a": "self_hosted/x"}}, (OURS, unknown))] == ["aliases.a"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"a"', "[" * 100_000])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(Invalid) as refused:
        require_fit(text, OFFERS)
    assert refused.value.param == "body"
