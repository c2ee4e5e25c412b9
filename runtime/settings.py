"""Every setting, read once from the environment (`STENOGATE_…`). No other module reads the environment."""

from __future__ import annotations

import binascii
import os
import re
from base64 import b64decode
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, cast
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic.config import JsonDict
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from runtime.addresses import Allowed

FOREIGN = ("STENOGATE_", "PG", "AWS_", "GOOGLE_", "AZURE_")
"""Beginnings of variables that are no business of an engine: our settings, and what opens databases and blob stores."""

KIB = 1024
MIB = 1024 * KIB
TIB = 1024 * 1024 * MIB
SECOND_MS = 1000
MINUTE_MS = 60 * SECOND_MS
DAY_MS = 24 * 60 * MINUTE_MS
SEALING_KEY_BYTES = 32

Change: TypeAlias = Literal["live", "new_sessions", "start"]
"""When another value takes effect in a running gateway: at once, in sessions opened from then on, or never."""

LIVE: JsonDict = {"change": "live"}
NEW_SESSIONS: JsonDict = {"change": "new_sessions"}


ENGINE_SETTINGS = (
    *("model", "whisper_model", "model_cache_dir", "device", "compute_type", "shortest_window"),
    *("engine_workers", "engine_queue", "engine_batch", "engine_idle_s"),
    *("max_upload_bytes", "log_level", "log_format"),
)


class Settings(BaseSettings):
    """What an operator may set. With none of it set, everything is embedded."""

    model_config = SettingsConfigDict(env_prefix="STENOGATE_", frozen=True, extra="ignore", hide_input_in_errors=True)

    data_dir: Path = Field(Path("data"), description="Where the embedded parts keep their files.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")

    database_url: SecretStr | None = Field(
        None, description="Postgres, as the app role that row-level security binds. Unset: an embedded Postgres."
    )
    system_database_url: SecretStr | None = Field(
        None, description="Postgres, as the role that sees across tenants (authentication, chores)."
    )
    migration_database_url: SecretStr | None = Field(
        None, description="Postgres, as the role that owns the tables; only `stenogate migrate` uses it."
    )
    database_pool: int = Field(16, ge=1, le=200, description="Connections per process and role.")
    redis_url: SecretStr | None = Field(None, description="Redis for limits and arq. Unset: in process.")
    blob_url: str | None = Field(None, description="file://, s3://, gs:// or az:// for uploads. Unset: the data dir.")

    signing_key: SecretStr | None = Field(
        None, description="HS256 key of gateway-issued tokens, at least 32 bytes; replicas share it. Unset: made once."
    )
    sealing_keys: SecretStr | None = Field(
        None,
        description="Master keys that seal relays' credentials, each `id:base64` of 32 bytes, with commas between;"
        " the first seals. Processes share them. Unset: made once, beside an embedded Postgres only.",
    )
    relay_allow_http: bool = Field(
        False, description="Allow relays over plain http beyond this machine: keys and audio then go in clear."
    )
    issuer: str = Field("stenogate", description="`iss` of gateway-issued tokens.")
    audience: str = Field("stenogate", description="`aud` that tokens must carry.")
    jwks_allow_http: bool = Field(False, description="Allow issuers' key sets over plain http (tests).")

    region: str = Field(
        "here",
        pattern="^[a-z0-9][a-z0-9-]{0,62}$",
        description="Where the engine of this installation is, as policies' `regions` name it.",
    )

    model: str = Field("auto", description="Default: `auto`, `micro`, `pocketsphinx`, a Whisper name or a folder.")
    whisper_model: str = Field("small", description="The faster-whisper model that `auto` looks for.")
    model_cache_dir: Path | None = Field(None, description="Where downloaded models lie. Unset: the hub's own cache.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where models run.")
    compute_type: str = Field("default", description="Of CTranslate2; `default`: int8 on CPU, float16 on GPU.")
    shortest_window: int | None = Field(
        None,
        ge=100,
        le=3000,
        description="Shortest Whisper window, in frames of 10 ms. Unset: what each model was measured to need.",
    )
    engine_workers: int = Field(0, ge=0, le=64, description="Recognitions at once; 0: as many as cores.")
    engine_queue: int = Field(256, ge=1, description="Recognitions waiting before a request is refused.")
    engine_batch: int = Field(
        0,
        ge=0,
        le=64,
        description="Short recognitions in one go; 0: 16 on a GPU, 1 on a CPU, where more gains little.",
    )
    engine_idle_s: float = Field(
        0.0,
        ge=0,
        le=86_400,
        description="A model that nobody asked for so long is unloaded, the default excepted; 0: never.",
    )
    engine_token: SecretStr | None = Field(
        None,
        min_length=1,
        description="Bearer token that callers of the engine role must send; a gateway with `STENOGATE_ENGINES` is one."
        " Unset: the engine only listens on loopback.",
    )
    engines: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None,
        description="Engines (`stenogate engine`) as `http(s)://host:port`, with commas between; each address of a name"
        " is one. Unset: the models are in a child process.",
    )
    backend: Literal["local", "scripted", "none"] = Field(
        "local",
        description="What `self_hosted` means here; `scripted` answers without a model, for smoke tests; `none`: there"
        " is no engine, only relays.",
    )
    relay_refresh_s: float = Field(
        3.0, gt=0, le=300, description="Relays and their credentials are read anew so often; what is down is tried."
    )
    relay_requests: int = Field(64, ge=1, le=10_000, description="Recordings at a relay at once, by credential.")
    relay_streams: int = Field(100, ge=1, le=10_000, description="Live streams at a relay at once, by credential.")

    max_upload_bytes: int = Field(
        2048 * MIB, ge=KIB, le=TIB, description="Largest upload accepted.", json_schema_extra=LIVE
    )
    job_threshold_bytes: int = Field(
        5 * MIB, ge=1, le=TIB, description="Uploads above this become jobs.", json_schema_extra=LIVE
    )
    job_threshold_ms: int = Field(
        5 * MINUTE_MS, ge=1, le=DAY_MS, description="Recordings above this become jobs.", json_schema_extra=LIVE
    )
    upload_idle_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="An upload that sends nothing for so long is cut off.",
        json_schema_extra=LIVE,
    )
    chunk_ms: int = Field(5 * MINUTE_MS, ge=10 * SECOND_MS, description="Longest piece of a job.")
    job_workers: int = Field(1, ge=1, le=32, description="Jobs at once in one worker process.")
    job_attempts: int = Field(3, ge=1, le=10, description="Tries before a job fails for good.")
    job_lease_s: float = Field(60.0, gt=0, description="A job whose worker is silent for so long is taken over.")

    max_streams: int = Field(
        256,
        ge=1,
        le=100_000,
        description="Live streams in one process; `per_channel`, each channel counts.",
        json_schema_extra=LIVE,
    )
    max_streams_per_address: int = Field(
        128,
        ge=1,
        le=100_000,
        description="Live streams of one client address (of one /64 with IPv6) in one process.",
        json_schema_extra=LIVE,
    )
    max_speaking: int | None = Field(
        None,
        ge=1,
        description="Live streams transcribed as they speak, at once in one process; others get finals only."
        " Unset: any number.",
    )
    max_queue_wait_s: float = Field(
        5.0,
        ge=0,
        le=600,
        description="New streams are refused while live work would wait longer for the engine.",
        json_schema_extra=LIVE,
    )
    stream_frames_per_s: int = Field(
        500,
        ge=10,
        le=100_000,
        description="Frames taken from one live stream; a faster sender is held back.",
        json_schema_extra=NEW_SESSIONS,
    )
    stream_idle_s: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="A live stream without any frame for so long is closed.",
        json_schema_extra=NEW_SESSIONS,
    )
    stream_resume_s: float = Field(
        60.0,
        ge=0,
        le=600,
        description="A live session whose socket was lost waits so long to be resumed; 0: not at all.",
        json_schema_extra=NEW_SESSIONS,
    )
    stream_drain_s: float = Field(
        10.0,
        ge=0,
        le=600,
        description="On SIGTERM, live streams may go on for so long; then their finals are awaited.",
        json_schema_extra=LIVE,
    )
    token_in_url: bool = Field(
        False,
        description="Allow `?token=` on the WebSocket (tokens then reach proxy logs).",
        json_schema_extra=LIVE,
    )
    origins: Annotated[frozenset[str] | None, NoDecode] = Field(
        None,
        description="Pages that may open live streams: origins such as `https://app.example`, with commas between;"
        " `*`: all. Unset: pages of the gateway's own host.",
        json_schema_extra=LIVE,
    )
    trusted_proxies: Annotated[tuple[IPv4Network | IPv6Network, ...] | None, NoDecode] = Field(
        None,
        description="Networks of proxies, with commas between, whose `X-Forwarded-…` is believed. Unset: none.",
    )

    egress_allow: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None,
        description="Networks and hosts, with commas between, that tenants' URLs (webhooks', recordings') may lead to"
        " beside public addresses, also over plain http and at any port. Unset: none.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="How much is logged.", json_schema_extra=LIVE
    )
    log_format: Literal["json", "console"] = Field("json", description="JSON lines, or lines for people.")

    @field_validator("origins", "trusted_proxies", "engines", "egress_allow", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """From the environment it comes as one text."""
        if not isinstance(value, str):
            return value
        return [part.strip() for part in value.split(",") if part.strip()] or None

    @field_validator("origins")
    @classmethod
    def _origins(cls, origins: frozenset[str] | None) -> frozenset[str] | None:
        for origin in origins or ():
            parts = urlsplit(origin)
            plain = origin.isprintable() and parts.netloc and origin == f"{parts.scheme}://{parts.netloc}"
            if origin != "*" and not plain:
                raise ValueError(f"{origin} is no origin; write scheme://host or scheme://host:port, or *")
        return None if origins is None else frozenset(origin.lower() for origin in origins)

    @field_validator("engines")
    @classmethod
    def _engines(cls, engines: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for url in engines or ():
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or url != f"{parts.scheme}://{parts.netloc}":
                raise ValueError("write each engine as http://host:port or https://host:port, with commas between")
            if "@" in parts.netloc or not _is_port(url):
                raise ValueError("an engine is a host and a port; its token is STENOGATE_ENGINE_TOKEN")
        return engines and tuple(dict.fromkeys(engines))

    @field_validator("egress_allow")
    @classmethod
    def _egress_allow(cls, entries: tuple[str, ...] | None) -> tuple[str, ...] | None:
        Allowed.of(entries or ())
        return entries

    @field_validator("signing_key")
    @classmethod
    def _long_enough(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and len(key.get_secret_value().encode()) < 32:
            raise ValueError("must be at least 32 bytes (RFC 7518, section 3.2); try `openssl rand -hex 32`")
        return key

    @field_validator("sealing_keys")
    @classmethod
    def _named_keys(cls, keys: SecretStr | None) -> SecretStr | None:
        if keys is not None:
            sealing_keys(keys.get_secret_value())
        return keys

    @field_validator("database_url", "system_database_url", "migration_database_url")
    @classmethod
    def _postgres(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and urlsplit(url.get_secret_value()).scheme not in ("postgres", "postgresql"):
            raise ValueError("must start with postgresql://")
        return url

    def changed(self, values: Mapping[str, Any]) -> Self:
        """The same but for these, which are checked as the environment's are. Raises pydantic's `ValidationError`."""
        checked = type(self)(**values)
        return self.model_copy(update={name: getattr(checked, name) for name in values})


def _is_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def sealing_keys(written: str) -> dict[str, bytes]:
    """Master keys by their ids, in their order. Raises `ValueError`, which quotes no key."""
    keys: dict[str, bytes] = {}
    for part in written.strip().strip(",").split(","):
        name, _, encoded = part.strip().partition(":")
        try:
            key = b64decode(encoded, validate=True)
        except binascii.Error:
            key = b""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,62}", name, re.ASCII) or len(key) != SEALING_KEY_BYTES:
            raise ValueError(
                "must be id:base64 of 32 bytes, with commas between; try `echo k1:$(openssl rand -base64 32)`"
            )
        if name in keys:
            raise ValueError(f"the id {name} stands there twice")
        keys[name] = key
    return keys


def change_of(name: str) -> Change:
    """When another value of this setting takes effect."""
    extra = Settings.model_fields[name].json_schema_extra
    return cast(Change, extra["change"]) if isinstance(extra, dict) and "change" in extra else "start"


CHANGEABLE = tuple(name for name in Settings.model_fields if change_of(name) != "start")
"""What an operator may change while gateways run; everything else is read once, at the start."""


def engine_environment(settings: Settings) -> dict[str, str]:
    """The environment of an engine in a process of its own: ours, and of the settings those that are about it. No
    secret is among them."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    chosen = {name: getattr(settings, name) for name in ENGINE_SETTINGS}
    return inherited | {f"STENOGATE_{name.upper()}": str(value) for name, value in chosen.items() if value is not None}
