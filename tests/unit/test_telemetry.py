"""No secret and nothing that was said reaches a log or a metric."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from runtime import telemetry

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJlLWNhbmFyeQ"
CANARY = "canary-7f3a"

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(params=["json", "console"])
def written(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Logging as configured in either form; gives what reached stderr."""
    with _configured(request.param):
        yield lambda: capsys.readouterr().err


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    with _configured("json"):
        yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@contextlib.contextmanager
def _configured(fmt: Literal["json", "console"]) -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    root.handlers.clear()  # pytest's own, which would be closed; it adds them again for each phase of a test
    telemetry.configure_logging("info", fmt)
    try:
        yield
    finally:
        structlog.contextvars.clear_contextvars()
        structlog.reset_defaults()
        logging.captureWarnings(capture=False)
        logging.getLogger("uvicorn.access").disabled = False
        root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler, telemetry._Stderr)]
        root.setLevel(level)


def test_a_line_has_time_level_event_and_what_is_bound(lines: Lines) -> None:
    structlog.contextvars.bind_contextvars(request_id="r1", tenant=UUID(int=7))
    structlog.get_logger("ours").info("job done", audio_ms=1500)
    logging.getLogger("uvicorn.error").info("started on port %d", 8080)
    ours, theirs = lines()
    assert ours["event"] == "job done"
    assert ours["audio_ms"] == 1500
    assert theirs["event"] == "started on port 8080"
    for line in (ours, theirs):
        assert line["level"] == "info"
        assert line["timestamp"].endswith("Z")
        assert (line["request_id"], line["tenant"]) == ("r1", str(UUID(int=7)))


def test_levels_and_the_access_log_are_kept_quiet(lines: Lines) -> None:
    structlog.get_logger().debug("hidden")
    logging.getLogger("uvicorn.access").info("GET / 200")
    logging.getLogger("httpx").info("HTTP Request: GET http://x")
    assert lines() == []


def test_warnings_become_log_lines(lines: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old way", UserWarning, stacklevel=1)
    assert ["old way" in line["event"] for line in lines()] == [True]


@pytest.mark.parametrize(
    "name",
    [
        *("authorization", "Set-Cookie", "token", "text", "audio", "prompt", "secret", "password", "signing_key"),
        *("access_token", "client-secret", "hotwords", "transcript", "headers", "body", "metadata"),
    ],
)
def test_sensitive_names_are_dropped(written: Callable[[], str], name: str) -> None:
    structlog.get_logger().info("seen", **{name: CANARY}, nested={"deep": [{name: CANARY}]})
    text = written()
    assert "seen" in text
    assert CANARY not in text


@pytest.mark.parametrize(
    "secret",
    [
        JWT,
        f"Bearer {CANARY}",
        f"authorization: bearer {CANARY}",
        f"postgresql://app:{CANARY}@db/stenogate",
        f"GET /v1/stream?token={CANARY}&x=1",
        f"GET /v1/stream?language=en&ticket={CANARY}",
        f"api_key={CANARY}",
        f"stenogate.v1, bearer.{JWT}",
    ],
)
def test_credentials_are_masked_wherever_they_stand(written: Callable[[], str], secret: str) -> None:
    structlog.get_logger().info(f"got {secret}", detail=secret, several=[secret], **{"by_name": {secret: 1}})
    logging.getLogger("library").warning("got %s", secret)
    try:
        raise ValueError(secret)  # noqa: TRY301
    except ValueError as error:
        structlog.get_logger().exception("failed", error=error)
        logging.getLogger("library").exception("failed")
    text = written()
    assert text.count("***") >= 6
    assert text.count("Traceback") == 2
    for canary in (CANARY, *JWT.split(".")):
        assert canary not in text


@dataclass
class Said:
    words: str


def test_of_unknown_objects_only_the_type_is_shown(written: Callable[[], str]) -> None:
    structlog.get_logger().info("seen", said=Said(CANARY), raw=CANARY.encode())
    text = written()
    assert "<Said>" in text
    assert "<bytes>" in text
    assert CANARY not in text


def test_very_long_values_are_shortened(lines: Lines) -> None:
    structlog.get_logger().info("seen", detail="eyJ" * 1_000_000, other="x" * 1_000_000)
    (line,) = lines()
    assert line["detail"] == "***…"
    assert len(line["other"]) == telemetry.LONGEST_VALUE + 1


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError(CANARY)


def test_a_line_that_cannot_be_made_shows_nothing_of_itself(written: Callable[[], str]) -> None:
    structlog.get_logger("ours").info("seen", detail=CANARY, error=Unprintable())
    text = written()
    assert "log line lost in ours: RuntimeError" in text
    assert CANARY not in text


def test_every_metric_is_described_and_none_names_a_tenant() -> None:
    telemetry.REQUESTS.labels("GET", "/livez", "200").inc()
    telemetry.QUEUE_DEPTH.set_function(lambda: 3)
    body, content_type = telemetry.exposition()
    assert content_type.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    ours = [family for name, family in families.items() if name.startswith("stenogate_")]
    assert len(ours) >= 18
    assert all(family.documentation for family in ours)
    labels = {label for family in ours for sample in family.samples for label in sample.labels}
    assert labels & {"tenant", "tenant_id"} == set()
    (depth,) = families["stenogate_queue_depth"].samples
    assert depth.value == 3


def test_people_see_the_same_numbers() -> None:
    telemetry.SETTLE_SECONDS.observe(0.004)
    telemetry.JOBS.labels("unknown").set(float("nan"))
    telemetry.LEDGER_ROWS.labels("self_hosted").inc(2)
    seen = json.loads(json.dumps(telemetry.as_json(), allow_nan=False))
    (settle,) = seen["stenogate_settle_seconds"]["values"]
    assert settle["count"] == settle["buckets"]["+Inf"] >= 1
    assert settle["sum"] > 0
    rows = {row["labels"]["backend"]: row["value"] for row in seen["stenogate_ledger_rows"]["values"]}
    assert rows["self_hosted"] >= 2
    assert {"labels": {"state": "unknown"}, "value": None} in seen["stenogate_jobs"]["values"]
    (build,) = seen["stenogate_build"]["values"]
    assert build["labels"]["version"]


async def test_a_blocked_loop_shows() -> None:
    def late() -> float:
        (lag,) = telemetry.as_json()["stenogate_event_loop_lag_seconds"]["values"]
        return float(lag["count"] - lag["buckets"]["0.05"])

    watch = asyncio.create_task(telemetry.watch_loop_lag(0.001))
    await asyncio.sleep(0)
    before = late()
    blocking = subprocess.run  # blocks the loop on purpose
    blocking([sys.executable, "-c", "import time; time.sleep(0.1)"], check=True)
    async with asyncio.timeout(30):
        while late() == before:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    watch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watch


@given(st.text(alphabet="eEyYJj0 .:/@=-_abBearcisktonw\n", max_size=60))
def test_nothing_that_is_masked_passes_for_harmless(text: str) -> None:
    found = any(pattern.search(text) for pattern, _ in telemetry.CREDENTIALS)
    assert not found or telemetry.MAYBE_A_CREDENTIAL.search(text)
