"""What the door says where nobody is left to ask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from dispatchers.backends.scripted import Scripted
from dispatchers.dispatch import Door
from dispatchers.registry import Registry
from policy.errors import NotAllowed, NothingUp
from policy.policies import Policy, PolicyBody
from policy.resolve import Candidate, Decision, Demand

LATER = Policy(uuid4(), 2, PolicyBody(models=("another",)))


def permitted(candidate: Candidate) -> tuple[Candidate, ...]:
    none: Any = None
    lease: Any = SimpleNamespace(tenant_id=LATER.tenant_id, decision=Decision((candidate,), ()))
    return Door(none, none, none, Registry.only(Scripted()))._permitted(LATER, Demand("job"), lease)


def test_a_backend_that_is_not_plugged_in_is_not_forbidden() -> None:
    with pytest.raises(NothingUp):
        permitted(Candidate("deepgram", "another", "first"))


def test_what_a_later_policy_does_not_allow_is_forbidden() -> None:
    with pytest.raises(NotAllowed):
        permitted(Candidate("self_hosted", "scripted", "first"))
