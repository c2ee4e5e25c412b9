"""What a process says about itself: log lines, and numbers.

Neither ever holds what was said, who may say it, or a secret. Log values are let through by type and by name, and what
looks like a credential is masked wherever it stands, tracebacks included.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import platform
import re
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from datetime import date
from decimal import Decimal
from functools import lru_cache
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, Literal
from uuid import UUID

import prometheus_client
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

# --- logs ---------------------------------------------------------------------------------------------------------

SENSITIVE = frozenset(
    {
        *(
            "authorization",
            "cookie",
            "set_cookie",
            "token",
            "jwt",
            "ticket",
            "secret",
            "password",
            "credentials",
            "dsn",
        ),
        *("headers", "query", "body", "metadata", "customer"),
        *("audio", "samples", "pcm", "text", "transcript", "words", "prompt", "hotwords"),
    }
)
SENSITIVE_ENDINGS = ("_token", "_secret", "_password", "_key", "_text", "_prompt")
CREDENTIALS = (
    (re.compile(r"eyJ[\w.-]{8,}"), "***"),  # RFC 7519: a JWT's header starts with {"
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]+", re.IGNORECASE), r"\1 ***"),
    (re.compile(r"://[^\s/@]*@"), "://***@"),
    (re.compile(r"\b(\w*(?:token|ticket|secret|password|key))=[^\s&'\"]+", re.IGNORECASE), r"\1=***"),
)
MAYBE_A_CREDENTIAL = re.compile(r"eyj|://|=|\bbearer\b|\bbasic\b", re.IGNORECASE)
"""In every text with one; most have none, and need not be looked through for each kind."""
LONGEST_VALUE = 16_384
TALKATIVE = (
    "httpx",
    "httpcore",
    "websockets",
    "mcp",
    "asyncio",
    "faster_whisper",
    "alembic",
)  # at `info` they log addresses and single frames


def configure_logging(level: str, fmt: Literal["json", "console"] = "json") -> None:
    """Sends every log line of the process, ours and the libraries', to stderr: as JSON objects, or for people.

    What is bound with `structlog.contextvars` (`request_id`, `tenant`) stands in each line. `level` is a name.
    """
    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: structlog.typing.Processor = structlog.processors.JSONRenderer(ensure_ascii=False)
    if fmt == "console":
        render = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = _Stderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.StackInfoRenderer(),
                discreet,
                render,
            ],
        )
    )
    # No line says where in the code, in which thread or in which task it was made, so nobody needs to find out.
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):  # the manual's "Optimization"
        setattr(logging, name, False)
    logging._srcfile = None
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    set_log_level(level)


def set_log_level(level: str) -> None:
    """From now on this much is logged, and of the talkative no more than warnings."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(threshold))
    logging.getLogger().setLevel(threshold)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))


def _is_news(record: logging.LogRecord) -> bool:
    """uvicorn calls it an error when an upgrade is refused with an HTTP status, which is what refusing means."""
    return record.msg != "ASGI callable returned without completing handshake."


class _Stderr(logging.Handler):
    """Writes to what is stderr at that moment. A line that cannot be made is replaced by why: `logging` itself would
    print its raw values."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001  # logging never breaks what it tells of
            line = f"log line lost in {record.name}: {type(error).__name__}"
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def discreet(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The line without what must not be logged (a structlog processor)."""
    return _without_secrets(line)


def masked(text: str) -> str:
    """The text, shortened if very long, with everything that looks like a credential replaced by `***`."""
    if len(text) > LONGEST_VALUE:
        text = f"{text[:LONGEST_VALUE]}…"
    if MAYBE_A_CREDENTIAL.search(text):
        for pattern, replacement in CREDENTIALS:
            text = pattern.sub(replacement, text)
    return text


def _without_secrets(fields: Mapping[Any, Any]) -> dict[str, Any]:
    return {_masked_name(str(name)): _shown(value) for name, value in fields.items() if not _is_sensitive(str(name))}


@lru_cache(1024)
def _masked_name(name: str) -> str:
    return masked(name)


@lru_cache(1024)
def _is_sensitive(name: str) -> bool:
    name = name.lower().replace("-", "_")
    return name in SENSITIVE or name.endswith(SENSITIVE_ENDINGS)


def _shown(value: object) -> object:
    """Values of known types; of any other only the type, since a `repr` may say anything."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return masked(value)
        case Mapping():
            return _without_secrets(value)
        case list() | tuple() | set() | frozenset():
            return [_shown(item) for item in value]
        case BaseException():
            return masked(f"{type(value).__name__}: {value}")
        case Decimal() | UUID() | date() | PurePath():
            return masked(str(value))
    return f"<{type(value).__name__}>"


# --- numbers ------------------------------------------------------------------------------------------------------
# No label names a tenant: labels are few and known beforehand, and a bill comes from the ledger.

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

ENGINE = CollectorRegistry()
"""What only the process with the models can count."""


class _EngineFigures(Collector):
    """The engine's numbers among all others: this process' own or, where the models are elsewhere, what was told there
    last. Those of a pool's engines carry a label, `engine`."""

    def __init__(self) -> None:
        self._told: Mapping[str, list[Metric]] | None = None

    def tell(self, told: Mapping[str, str] | None) -> None:
        """What engines told, in Prometheus' text format, by label ("": the only one); None: this process' own are true.
        Raises `ValueError`."""
        parsed = {label: list(text_string_to_metric_families(text)) for label, text in (told or {}).items()}
        self._told = None if told is None else parsed

    def collect(self) -> Iterable[Metric]:
        return ENGINE.collect() if self._told is None else _together(self._told)


def _together(told: Mapping[str, list[Metric]]) -> Iterable[Metric]:
    together: dict[str, Metric] = {}
    for engine, families in told.items():
        more = {"engine": engine} if engine else {}
        for family in families:
            whole = together.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples.extend(sample._replace(labels=sample.labels | more) for sample in family.samples)
    return together.values()


ENGINE_FIGURES = _EngineFigures()
REGISTRY.register(ENGINE_FIGURES)

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LAG = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)
HUMAN = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
WAIT = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def _counter(name: str, meaning: str, *labels: str, registry: CollectorRegistry = REGISTRY) -> Counter:
    return Counter(f"stenogate_{name}", meaning, labels, registry=registry)


def _gauge(name: str, meaning: str, *labels: str, registry: CollectorRegistry = REGISTRY) -> Gauge:
    return Gauge(f"stenogate_{name}", meaning, labels, registry=registry)


def _histogram(
    name: str, meaning: str, buckets: tuple[float, ...], *labels: str, registry: CollectorRegistry = REGISTRY
) -> Histogram:
    return Histogram(f"stenogate_{name}", meaning, labels, buckets=buckets, registry=registry)


REQUESTS = _counter("requests", "Requests answered.", "method", "route", "status")
REQUEST_SECONDS = _histogram(
    "request_seconds", "From a request's head to the end of its answer; live streams apart.", LONG, "method", "route"
)
AUTH_FAILURES = _counter("auth_failures", "Tokens that were not accepted, by error code.", "code")

LIVE_STREAMS = _gauge("live_streams", "Live streams now open.", "protocol")
SEATS_FREE = _gauge("seats_free", "Live streams that this process would still let in.")
STREAM_LAG_SECONDS = _gauge("stream_lag_seconds", "Audio received and not yet heard, over live streams.", "quantile")
STREAMS_ENDED = _counter("streams_ended", "Live streams ended, by WebSocket close code.", "protocol", "code")
STREAM_RESUMES = _counter("stream_resumes", "Live sessions asked for again, by outcome.", "outcome")
STREAM_SECONDS = _counter("stream_seconds", "Seconds of live audio accepted.", "protocol")
UTTERANCES = _counter("utterances", "Utterances of live streams that got their final.")
UNTOLD_PARTIALS = _counter(
    "untold_partials", "Partials of live streams that were due and never told, by reason.", "reason"
)
SPEAKERS = _gauge("speakers", "Streams with partials that are in speech now and are transcribed as they speak.")
SPEAKERS_LIMITED = _counter("speakers_limited", "Utterances begun while as many spoke as may: finals only.")
FIRST_PARTIAL_SECONDS = _histogram(
    "first_partial_seconds", "From the start of an utterance to its first partial.", HUMAN
)
FINAL_SECONDS = _histogram("speech_end_to_final_seconds", "From the last speech of an utterance to its final.", HUMAN)

QUEUE_DEPTH = _gauge("queue_depth", "Recognitions waiting for a worker of this engine.", registry=ENGINE)
QUEUE_RUNNING = _gauge("queue_running", "Recognitions running in this engine.", registry=ENGINE)
QUEUE_SECONDS = _histogram("queue_seconds", "Time recognitions waited for a worker.", WAIT, "urgency", registry=ENGINE)
BATCH_SIZE = _histogram("batch_size", "Recognitions that a worker took at once.", SIZES, registry=ENGINE)
COALESCED_PARTIALS = _counter("coalesced_partials", "Waiting partials whose place a newer one took.", registry=ENGINE)
DROPPED_PARTIALS = _counter("dropped_partials", "Waiting partials that came too late.", registry=ENGINE)
RECOGNITION_SECONDS = _histogram(
    "recognition_seconds", "Time a model took for one piece of audio.", LONG, "model", registry=ENGINE
)
RECOGNISED_SECONDS = _counter("recognised_audio_seconds", "Audio that models worked on.", "model", registry=ENGINE)

ENGINE_UP = _gauge("engine_up", "Whether the engine's process, or one of the pool's engines, is ready for work.")
ENGINE_RESTARTS = _counter("engine_restarts", "Starts of the engine's process after it had ended by itself.")

ENGINES = _gauge("engines", "Engines of the pool, by state.", "state")
ENGINE_IN_FLIGHT = _gauge("engine_in_flight", "Recognitions asked of an engine of the pool and not answered.", "engine")
ENGINE_EJECTIONS = _counter("engine_ejections", "Engines let out of the pool for a while, by reason.", "reason")
ENGINE_RETRIES = _counter("engine_retries", "Recognitions given to another engine of the pool, by error code.", "code")

BACKEND_UP = _gauge("backend_up", "Whether the backend can be asked, with one credential at least.", "backend")
BACKEND_CREDENTIALS = _gauge(
    "backend_credentials", "Credentials of a relay, by their breaker's state.", "backend", "state"
)
BREAKER_TRANSITIONS = _counter("breaker_transitions", "Changes of breakers, by the state entered.", "backend", "state")
BACKEND_COOL_DOWNS = _counter("backend_cool_downs", "Pauses that a provider asked for.", "backend")
BACKEND_RUNNING = _gauge("backend_running", "Requests and streams now at a relay.", "backend", "kind")
BACKEND_PROBES = _counter("backend_probes", "Active probes of relays that were down, by outcome.", "backend", "outcome")
LEGS = _counter("legs", "Attempts at sessions, by outcome.", "backend", "outcome")
LEG_SECONDS = _histogram("leg_seconds", "How long an attempt took; streams apart.", LONG, "backend")
FAILOVERS = _counter("failovers", "Sessions that went on elsewhere, by the backend left.", "backend", "kind")
FAILOVERS_REFUSED = _counter("failovers_refused", "Requests not tried elsewhere, as too many were.", "backend")

JOBS = _gauge("jobs", "Jobs by state.", "state")

RECORDED_SECONDS = _counter("recorded_audio_seconds", "Audio of live sessions kept.")
UNRECORDED_SECONDS = _counter("unrecorded_audio_seconds", "Audio that was to be kept and is lost, by reason.", "reason")
RECORDINGS_DELETED = _counter("recordings_deleted", "Kept recordings deleted for good, by reason.", "reason")
RECORDINGS_OVERDUE = _counter("recording_deletions_failed", "Attempts to delete a recording that failed.")

WEBHOOK_ATTEMPTS = _counter("webhook_attempts", "Tries to deliver a webhook, by what came of them.", "outcome")
WEBHOOK_BACKLOG_SECONDS = _gauge("webhook_backlog_seconds", "How long the oldest due delivery of a webhook waits.")

LEDGER_AUDIO_MS = _counter("ledger_audio_milliseconds", "Audio written to the ledger.", "backend")
LEDGER_ROWS = _counter("ledger_rows", "Rows written to the ledger.", "backend")
SETTLE_SECONDS = _histogram("settle_seconds", "Time the settling transaction took.", FAST)
BUDGET_REFUSALS = _counter("budget_refusals", "Requests refused because a budget did not cover them.")

LOOP_LAG_SECONDS = _histogram("event_loop_lag_seconds", "How late the event loop woke a sleeper.", LAG)
Info("stenogate_build", "What is running.", registry=REGISTRY).info(
    {"version": version("stenogate"), "python": platform.python_version()}
)


def exposition(registry: CollectorRegistry = REGISTRY) -> tuple[bytes, str]:
    """Every number in Prometheus' text format, and its content type."""
    return prometheus_client.generate_latest(registry), prometheus_client.CONTENT_TYPE_LATEST


def as_json() -> dict[str, Any]:
    """The same numbers for people: name → `help`, `type` and `values`; a histogram's value is its `count`, `sum` and
    cumulative `buckets`."""
    return {
        family.name: {"help": family.documentation, "type": family.type, "values": _values(family)}
        for family in REGISTRY.collect()
    }


def _values(family: Metric) -> list[dict[str, Any]]:
    found: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for sample in family.samples:
        labels = {name: value for name, value in sample.labels.items() if name != "le"}
        entry = found.setdefault(tuple(labels.items()), {"labels": labels})
        value = sample.value if math.isfinite(sample.value) else None
        match sample.name.removeprefix(family.name):
            case "_bucket":
                entry.setdefault("buckets", {})[sample.labels["le"]] = value
            case "_count" | "_sum" as part:
                entry[part[1:]] = value
            case _:
                entry["value"] = value
    return list(found.values())


async def watch_loop_lag(interval_s: float) -> None:
    """Measures for ever how late the event loop is; to be run as a task, and cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        LOOP_LAG_SECONDS.observe(max(0.0, loop.time() - due))
