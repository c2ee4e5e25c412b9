"""What a tenant may do: one validated document, kept in versions that never change.

A session stores the version it was decided under, so what was allowed then can always be shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_serializer, field_validator, model_validator
from sqlalchemy import text

from policy import audit
from policy.endpointing import VadRules
from policy.errors import NotFound
from runtime.database import Transaction

BackendKind: TypeAlias = Literal["self_hosted", "relay"]
Feature: TypeAlias = Literal["words", "translate", "streaming", "speakers"]
Language = Annotated[str, Field(pattern="^[a-z]{2,3}$")]
ModelName = Annotated[str, Field(min_length=1, max_length=200)]

HOUR_MS = 3_600_000
HOUR_S = 3_600
DAY_S = 24 * HOUR_S


class PolicyBody(BaseModel):
    """A policy's content. Every default is what a new tenant gets. None means "no restriction of its own"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backends: tuple[BackendKind, ...] = Field(("self_hosted",), min_length=1, description="Allowed, in this order.")
    forbid_relay: bool = Field(False, description="Residency: audio never leaves this installation, whatever else.")
    fallback: bool = Field(True, description="Whether the next backend may serve when the first cannot.")

    default_model: ModelName | None = Field(None, description="For requests that name none. None: the backend's own.")
    models: tuple[ModelName, ...] | None = Field(None, description="Allowed models.")
    partial_model: ModelName | None = Field(None, description="For partials of live streams. None: as for finals.")
    languages: tuple[Language, ...] | None = Field(None, description="Languages that may be asked for, ISO 639.")
    features: frozenset[Feature] | None = Field(None, description="Allowed features.")

    max_streams: int = Field(8, ge=0, description="Live streams at once.")
    max_speaking: PositiveInt | None = Field(None, description="Live streams transcribed as they speak, at once.")
    max_requests: int = Field(16, ge=0, description="File requests at once.")
    requests_per_minute: PositiveInt | None = Field(600, description="Requests of any kind.")
    max_file_ms: PositiveInt = Field(4 * HOUR_MS, description="Longest recording.")
    max_stream_ms: PositiveInt = Field(4 * HOUR_MS, description="Longest live stream.")
    vad: VadRules | None = Field(None, description="Endpointing of live streams. None: the installation's range.")
    max_upload_bytes: PositiveInt | None = Field(None, description="Largest upload. None: the installation's.")
    job_threshold_bytes: PositiveInt | None = Field(None, description="Uploads above it become jobs. None: as above.")
    job_threshold_ms: PositiveInt | None = Field(None, description="Recordings above it become jobs. None: as above.")

    keep_transcripts: bool = Field(True, description="Whether sessions keep their final text.")
    keep_audio: bool = Field(False, description="Whether live sessions keep their audio.")
    audio_ttl_s: int = Field(
        30 * DAY_S, ge=HOUR_S, le=3650 * DAY_S, description="How long audio is kept, from its end."
    )

    @field_validator("backends", "models", "languages")
    @classmethod
    def _unique(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if values is not None and len(set(values)) != len(values):
            raise ValueError("names something twice")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> PolicyBody:
        if self.default_model is not None and self.models is not None and self.default_model not in self.models:
            raise ValueError("default_model is not among models")
        if self.partial_model is not None and self.models is not None and self.partial_model not in self.models:
            raise ValueError("partial_model is not among models")
        if self.forbid_relay and self.backends == ("relay",):
            raise ValueError("forbid_relay leaves no backend")
        return self

    @field_serializer("features")
    def _sorted(self, features: frozenset[str] | None) -> list[str] | None:
        return None if features is None else sorted(features)


@dataclass(frozen=True)
class Policy:
    """One version of a tenant's policy."""

    tenant_id: UUID
    version: int
    body: PolicyBody


async def current(tx: Transaction, tenant_id: UUID) -> Policy:
    """The version in force. Raises `NotFound` (also for another tenant's)."""
    policy = await _newest(tx, tenant_id)
    if policy is None:
        raise NotFound("The tenant has no policy.")
    return policy


async def at_version(tx: Transaction, tenant_id: UUID, version: int) -> Policy:
    """A version, in force or not: what a session was decided under. Raises `NotFound`."""
    row = (await tx.execute(_AT_VERSION, {"tenant_id": tenant_id, "version": version})).one_or_none()
    if row is None:
        raise NotFound("The tenant has no such policy.")
    return Policy(tenant_id, version, PolicyBody.model_validate_json(row.body))


async def put(tx_system: Transaction, tenant_id: UUID, body: PolicyBody, *, actor: str) -> Policy:
    """Puts the next version in force from now on. Concurrent callers follow one another. Raises `NotFound`."""
    locked = text("select slug from tenants where id = :tenant_id for update")
    slug = (await tx_system.execute(locked, {"tenant_id": tenant_id})).scalar_one_or_none()
    if slug is None:
        raise NotFound("There is no such tenant.")
    before = await _newest(tx_system, tenant_id)
    policy = Policy(tenant_id, before.version + 1 if before else 1, body)
    await tx_system.execute(_CLOSE, {"tenant_id": tenant_id, "version": policy.version - 1})
    await tx_system.execute(
        _OPEN,
        {"tenant_id": tenant_id, "version": policy.version, "body": body.model_dump_json(), "created_by": actor},
    )
    await audit.record(
        tx_system,
        actor=actor,
        action="policy.put",
        object=f"policy/{slug}/{policy.version}",
        tenant_id=tenant_id,
        before=None if before is None else before.body.model_dump(mode="json"),
        after=body.model_dump(mode="json"),
    )
    return policy


async def _newest(tx: Transaction, tenant_id: UUID) -> Policy | None:
    row = (await tx.execute(_NEWEST, {"tenant_id": tenant_id})).one_or_none()
    return None if row is None else Policy(tenant_id, row.version, PolicyBody.model_validate_json(row.body))


_NEWEST = text("""
    select version, cast(body as text) as body from policies
    where tenant_id = :tenant_id order by version desc limit 1
""")

_AT_VERSION = text("""
    select cast(body as text) as body from policies where tenant_id = :tenant_id and version = :version
""")

# The wall clock, not now(): a transaction that waited for the lock began before the version it replaces. Should the
# clock have been set back, the old version keeps an empty range, and the new one begins where that one began.
_CLOSE = text("""
    update policies set effective = tstzrange(lower(effective), greatest(lower(effective), clock_timestamp()))
    where tenant_id = :tenant_id and version = :version
""")
_OPEN = text("""
    insert into policies (tenant_id, version, effective, body, created_by)
    select :tenant_id, :version,
           tstzrange((select coalesce(max(upper(effective)), clock_timestamp()) from policies
                      where tenant_id = :tenant_id), null),
           cast(:body as jsonb), :created_by
""")
