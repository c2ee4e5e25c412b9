"""What a tenant may do: one validated document, kept in versions that never change.

A session stores the version it was decided under, so what was allowed then can always be shown. Versions follow one
another on the clock without a gap; one may be put in force at a later moment (`policy.history` shows and withdraws
them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeAlias
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator
from sqlalchemy import text

from policy import audit
from policy.endpointing import VadRules
from policy.errors import Conflict, Invalid, NotFound
from runtime.database import Transaction

SELF_HOSTED = "self_hosted"
RELAYS = "relay"
"""In a policy: every relay that it does not name otherwise."""

Kind: TypeAlias = Literal["file", "stream", "job"]
Feature: TypeAlias = Literal["words", "translate", "streaming", "speakers"]
Language = Annotated[str, Field(pattern="^[a-z]{2,3}$")]
ModelName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
BackendName = Annotated[str, Field(pattern="^(self_hosted|[a-z][a-z0-9-]{0,62})$")]
Region = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]{0,62}$")]
Amount = Annotated[str, Field(strict=True, pattern=r"^(0|[1-9][0-9]{0,8})(\.[0-9]{1,9})?$")]
Count = Annotated[int, Field(ge=0, le=10**15)]
Positive = Annotated[int, Field(gt=0, le=10**15)]

HOUR_MS = 3_600_000
HOUR_S = 3_600
DAY_S = 24 * HOUR_S


class PolicyBody(BaseModel):
    """A policy's content. Every default is what a new tenant gets. None means "no restriction of its own"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backends: tuple[BackendName, ...] = Field((SELF_HOSTED,), min_length=1, description="Allowed, in this order.")
    forbid_relay: bool = Field(False, description="Residency: audio never leaves this installation, whatever else.")
    regions: tuple[Region, ...] | None = Field(None, min_length=1, description="Where audio may go.")
    fallback: bool = Field(True, description="Whether the next backend may serve when the first cannot.")
    max_price_per_hour: Amount | None = Field(None, description="No backend that costs the tenant more, exactly.")

    default_model: ModelName | None = Field(None, description="For requests that name none. None: the backend's own.")
    models: tuple[ModelName, ...] | None = Field(None, description="Allowed models.")
    backend_models: dict[BackendName, Annotated[tuple[ModelName, ...], Field(min_length=1)]] = Field(
        {}, max_length=100, description="Allowed models of a backend, its default first."
    )
    aliases: dict[ModelName, ModelName] = Field(
        {}, max_length=100, description="Names for models; `backend/model` pins the backend, too."
    )
    partial_model: ModelName | None = Field(None, description="For partials of live streams. None: as for finals.")
    languages: tuple[Language, ...] | None = Field(None, description="Languages that may be asked for, ISO 639.")
    features: frozenset[Feature] | None = Field(None, description="Allowed features.")

    max_streams: Count = Field(8, description="Live streams at once.")
    max_speaking: Positive | None = Field(None, description="Live streams transcribed as they speak, at once.")
    max_requests: Count = Field(16, description="File requests at once.")
    requests_per_minute: Positive | None = Field(600, description="Requests of any kind.")
    max_file_ms: Positive = Field(4 * HOUR_MS, description="Longest recording.")
    max_job_ms: Positive | None = Field(None, description="Longest recording of a job. None: as `max_file_ms`.")
    max_stream_ms: Positive = Field(4 * HOUR_MS, description="Longest live stream.")
    vad: VadRules | None = Field(None, description="Endpointing of live streams. None: the installation's range.")
    max_upload_bytes: Positive | None = Field(None, description="Largest upload. None: the installation's.")
    job_threshold_bytes: Positive | None = Field(None, description="Uploads above it become jobs. None: as above.")
    job_threshold_ms: Positive | None = Field(None, description="Recordings above it become jobs. None: as above.")

    keep_transcripts: bool = Field(True, description="Whether sessions keep their final text.")
    keep_audio: bool = Field(False, description="Whether live sessions keep their audio.")
    audio_ttl_s: int = Field(
        30 * DAY_S, ge=HOUR_S, le=3650 * DAY_S, description="How long audio is kept, from its end."
    )

    @field_validator("backends", "regions", "models", "languages")
    @classmethod
    def _unique(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if values is not None and len(set(values)) != len(values):
            raise ValueError("names something twice")
        return values

    @field_validator("aliases")
    @classmethod
    def _ends(cls, aliases: dict[str, str]) -> dict[str, str]:
        for name in aliases:
            way = [name]
            while (following := aliases.get(way[-1])) is not None:
                if following in way:
                    raise ValueError(f"goes round in a circle: {' → '.join((*way, following))}")
                way.append(following)
        return aliases

    @model_validator(mode="after")
    def _consistent(self) -> PolicyBody:
        if self.forbid_relay and SELF_HOSTED not in self.backends:
            raise ValueError("forbid_relay leaves no backend: self_hosted is not among backends")
        for name in self.backend_models:
            if self.place(name) is None:
                raise ValueError(f"backend_models names {name}, which is not among backends")
            if self.models is not None and not set(self.backend_models[name]) & set(self.models):
                raise ValueError(f"backend_models leaves {name} no model that is among models")
        named = {"default_model": self.default_model, "partial_model": self.partial_model}
        for name, model in [*named.items(), *((f"aliases.{alias}", alias) for alias in self.aliases)]:
            if model is not None:
                self._check_named(name, self.target(model))
        return self

    def _check_named(self, name: str, target: str) -> None:
        backend, _, model = target.partition("/")
        if backend == SELF_HOSTED and model and SELF_HOSTED not in self.backends:
            raise ValueError(f"{name} leads to {backend}, which is not among backends")
        if self.models is not None and not {target, model} & set(self.models):
            raise ValueError(f"{name} is not among models" if "." not in name else f"{name} leads out of models")

    def target(self, name: str) -> str:
        """What a name means at last: a model, or `backend/model`."""
        while name in self.aliases:
            name = self.aliases[name]
        return name

    def place(self, backend: str) -> int | None:
        """Where a backend stands in the order; None: it is not allowed. Whatever is not `self_hosted` is a relay."""
        name = _rule(backend, self.backends)
        return None if name is None else self.backends.index(name)

    def models_of(self, backend: str) -> tuple[str, ...] | None:
        """The backend's own list of allowed models. None: it has none."""
        name = _rule(backend, self.backend_models)
        return None if name is None else self.backend_models[name]

    def allows(self, model: str, backend: str) -> bool:
        """Whether this model of that backend may be used."""
        own = self.models_of(backend)
        return (self.models is None or model in self.models) and (own is None or model in own)

    def longest_ms(self, kind: Kind) -> int:
        """The most audio of a file, a stream or a job."""
        if kind == "stream":
            return self.max_stream_ms
        return self.max_job_ms or self.max_file_ms if kind == "job" else self.max_file_ms

    @property
    def max_price_nano_per_hour(self) -> int | None:
        """`max_price_per_hour` in nano-units."""
        return None if self.max_price_per_hour is None else int(Decimal(self.max_price_per_hour).scaleb(9))

    @field_serializer("features")
    def _sorted(self, features: frozenset[str] | None) -> list[str] | None:
        return None if features is None else sorted(features)


@dataclass(frozen=True)
class Policy:
    """One version of a tenant's policy."""

    tenant_id: UUID
    version: int
    body: PolicyBody


def _rule(backend: str, rules: tuple[str, ...] | Mapping[str, object]) -> str | None:
    """The name under which rules speak of a backend: its own, or that of all relays."""
    if backend in rules:
        return backend
    return RELAYS if backend != SELF_HOSTED and RELAYS in rules else None


async def current(tx: Transaction, tenant_id: UUID) -> Policy:
    """The version in force. Raises `NotFound` (also for another tenant's)."""
    policy, _ = await in_force(tx, tenant_id)
    return policy


async def in_force(tx: Transaction, tenant_id: UUID) -> tuple[Policy, float | None]:
    """The version in force, and in how many seconds the next one takes its place, if one is to. Raises `NotFound`."""
    row = (await tx.execute(_IN_FORCE, {"tenant_id": tenant_id})).one_or_none()
    if row is None:
        raise NotFound("The tenant has no policy.")
    return Policy(tenant_id, row.version, PolicyBody.model_validate_json(row.body)), row.ends_in_s


async def at_version(tx: Transaction, tenant_id: UUID, version: int) -> Policy:
    """A version, in force or not: what a session was decided under. Raises `NotFound`."""
    row = (await tx.execute(_AT_VERSION, {"tenant_id": tenant_id, "version": version})).one_or_none()
    if row is None:
        raise NotFound("The tenant has no such policy.")
    return Policy(tenant_id, version, PolicyBody.model_validate_json(row.body))


async def put(
    tx_system: Transaction,
    tenant_id: UUID,
    body: PolicyBody,
    *,
    actor: str,
    effective_from: datetime | None = None,
    newest: int | None = None,
    action: Literal["policy.put", "policy.rollback"] = "policy.put",
    request_id: str | None = None,
) -> Policy:
    """Puts the next version in force, now or from a later moment, until the next one that is scheduled by then.
    Concurrent callers follow one another; `newest` is the version that the caller takes for the newest one.

    Raises `NotFound`, `Invalid` (a moment that has passed), `Conflict` (there is a version after `newest`).
    """
    slug = await locked(tx_system, tenant_id)
    place = (await tx_system.execute(_PLACE, {"tenant_id": tenant_id, "at": effective_from})).one()
    if newest is not None and newest != place.newest:
        raise Conflict(f"Version {place.newest} was put meanwhile: look at it, then put yours again.")
    if effective_from is not None and place.at <= place.now:
        raise Invalid("The moment from which it is to be in force has passed.", param="effective_from")
    policy = Policy(tenant_id, place.newest + 1, body)
    await tx_system.execute(_CLOSE, {"tenant_id": tenant_id, "version": place.version, "at": place.at})
    written = {"version": policy.version, "body": body.model_dump_json(), "actor": actor}
    await tx_system.execute(
        _OPEN, {"tenant_id": tenant_id, "at": place.at, "until": place.until, "now": place.now, **written}
    )
    after: dict[str, Any] = body.model_dump(mode="json")
    await audit.record(
        tx_system,
        actor=actor,
        action=action,
        object=f"policy/{slug}/{policy.version}",
        tenant_id=tenant_id,
        before=place.body,
        after=after if effective_from is None else {"effective_from": place.at.isoformat(), **after},
        request_id=request_id,
    )
    return policy


async def locked(tx_system: Transaction, tenant_id: UUID) -> str:
    """The tenant's slug; nobody else changes its versions until the transaction ends. Raises `NotFound`."""
    row = text("select slug from tenants where id = :tenant_id for no key update")
    slug: str | None = (await tx_system.execute(row, {"tenant_id": tenant_id})).scalar_one_or_none()
    if slug is None:
        raise NotFound("There is no such tenant.")
    return slug


# The clock of the statement, not now(): a transaction that waited began before the version it asks for. Should the
# clock have been set back, it stands at the newest version's creation until it has caught up.
_IN_FORCE = text("""
    with known as (
        select version, body, effective, greatest(statement_timestamp(), max(created_at) over ()) as clock
        from policies where tenant_id = :tenant_id
    )
    select version, cast(body as text) as body,
           cast(extract(epoch from upper(effective) - clock) as float8) as ends_in_s
    from known where effective @> clock
""")

_AT_VERSION = text("""
    select cast(body as text) as body from policies where tenant_id = :tenant_id and version = :version
""")

# The version in force at the moment, from which the new one takes over. Where that one begins at this very moment, it
# keeps an empty range.
_PLACE = text("""
    with clock as materialized (
        select greatest(clock_timestamp(), max(created_at)) as now, coalesce(max(version), 0) as newest
        from policies where tenant_id = :tenant_id
    ), moment as (
        select now, newest, coalesce(cast(:at as timestamptz), now) as at from clock
    )
    select now, newest, at, former.version, former.body, upper(former.effective) as until
    from moment left join policies former on former.tenant_id = :tenant_id and former.effective @> at
""")
_CLOSE = text("""
    update policies set effective = tstzrange(lower(effective), :at)
    where tenant_id = :tenant_id and version = :version
""")
_OPEN = text("""
    insert into policies (tenant_id, version, effective, body, created_by, created_at)
    values (:tenant_id, :version, tstzrange(:at, :until), cast(:body as jsonb), :actor, :now)
""")
