from __future__ import annotations

import importlib
import json
import pkgutil

import pytest
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

import dispatchers
import gateway
import policy
import runtime
import workers
from dispatchers.errors import BackendFailed, NotAudio
from gateway.errors import (
    MEANINGS,
    Internal,
    MethodNotAllowed,
    RouteNotFound,
    close_code,
    every_error,
    headers_of,
    http_status,
    known,
    openai_json,
    problem_json,
    problem_response,
    told_again,
)
from policy.errors import Invalid, LedgerUnavailable, NothingUp, RateLimited, TokenMissing
from runtime.errors import StenogateError
from workers.errors import JobFailed

for _package in (gateway, workers, dispatchers, policy, runtime):
    for _module in pkgutil.walk_packages(_package.__path__, f"{_package.__name__}."):
        if not _module.name.endswith("__main__") and ".micro." not in _module.name:
            importlib.import_module(_module.name)

ERRORS = sorted(set(every_error()), key=lambda error: f"{error.__module__}.{error.__name__}")


def test_the_tree_is_there() -> None:
    assert {Internal, NotAudio, TokenMissing, JobFailed, StenogateError} <= set(ERRORS)
    assert len(ERRORS) > 40


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_has_a_meaning_in_every_protocol(error: type[StenogateError]) -> None:
    raised = error("what happened")
    assert 400 <= http_status(raised) < 600
    close = close_code(raised)
    assert close in (1003, 1007, 1009, 1011, 1012, 1013) or 4400 <= close < 4600
    problem = problem_json(raised, "req_1")
    assert {"type", "title", "status", "detail", "code", "request_id", "retryable"} == set(problem)
    assert problem["title"]
    assert openai_json(raised)["message"] == "what happened"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_speaks_for_itself(error: type[StenogateError]) -> None:
    assert error.__doc__
    assert error().message
    assert error.code == error.code.upper()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_only_what_may_succeed_later_asks_to_be_retried(error: type[StenogateError]) -> None:
    headers = headers_of(error())
    assert headers["x-should-retry"] == ("true" if error.retryable else "false")
    assert error.retryable or "retry-after" not in headers
    if error.retryable and http_status(error()) in (429, 503):
        assert 1 <= int(headers["retry-after"]) <= 120


def test_no_meaning_without_an_error_or_a_frame() -> None:
    live_only = {"UNKNOWN_MESSAGE", "RESTARTING", "SESSION_TAKEN_OVER", "RESUME_FAILED", "TOO_FAST"}
    assert set(MEANINGS) - {error.code for error in ERRORS} <= live_only


def test_the_native_protocols_close_codes() -> None:
    stated = {
        **{"UNSUPPORTED_FRAME": 1003, "UNDECODABLE": 1007, "MESSAGE_TOO_BIG": 1009, "INTERNAL": 1011},
        **{"RESTARTING": 1012, "NO_SEAT": 1013, "BAD_PARAMETERS": 4400, "TOKEN_EXPIRED": 4401, "TOKEN_REVOKED": 4401},
        **{"TOKEN_INVALID": 4401, "BUDGET_EXHAUSTED": 4402, "FORBIDDEN": 4403, "TENANT_SUSPENDED": 4403},
        **{"IDLE": 4408, "SESSION_TOO_LONG": 4408, "SESSION_TAKEN_OVER": 4409, "RESUME_FAILED": 4410},
        **{"TOO_FAST": 4413, "NOT_READING": 4413, "RATE_LIMITED": 4429, "CONCURRENCY_LIMITED": 4429},
        **{"BACKEND_UNAVAILABLE": 4503},
    }
    assert {code: MEANINGS[code].close for code in stated} == stated


def test_a_servers_wait_is_told_and_never_so_long_that_a_client_gives_up() -> None:
    assert headers_of(RateLimited(retry_after_s=2.2))["retry-after"] == "3"
    assert headers_of(NothingUp(retry_after_s=9000))["retry-after"] == "120"
    assert headers_of(TokenMissing())["www-authenticate"] == "Bearer"


def test_a_problem_names_the_parameter_and_carries_openais_shape_where_asked() -> None:
    response = problem_response(Invalid("No.", param="model"), "req_7", openai=True)
    body = json.loads(bytes(response.body))
    assert response.status_code == 400
    assert response.media_type == "application/problem+json"
    assert (body["param"], body["request_id"]) == ("model", "req_7")
    assert body["error"] == {
        "message": "No.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "invalid_value",
    }
    assert "error" not in json.loads(bytes(problem_response(Invalid("No."), "req_7").body))


def test_the_unforeseen_says_nothing_of_itself() -> None:
    error = known(RuntimeError("secret words"))
    assert isinstance(error, Internal)
    assert "secret" not in json.dumps(problem_json(error, "req_1"))


def test_frameworks_and_drivers_errors_become_ours() -> None:
    assert isinstance(known(HTTPException(404)), RouteNotFound)
    assert isinstance(known(HTTPException(405)), MethodNotAllowed)
    assert http_status(known(HTTPException(418))) == 400
    assert isinstance(known(ConnectionRefusedError()), LedgerUnavailable)
    gone = OperationalError("select 1", {}, Exception(), connection_invalidated=True)
    assert isinstance(known(gone), LedgerUnavailable)
    assert isinstance(known(OperationalError("select 1", {}, Exception())), Internal)


def test_a_stored_failure_is_told_as_what_it_was() -> None:
    assert type(told_again("BACKEND_FAILED", "No.")).code == BackendFailed.code
    assert http_status(told_again("UNDECODABLE", "No.")) == 400
    assert isinstance(told_again("GONE_SINCE", "No."), JobFailed)
