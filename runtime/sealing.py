"""Secrets at rest, in envelopes: each is sealed with a data key of its own, and that with a master key.

A database alone opens nothing, and a new master key means wrapping data keys anew, not the secrets. The master keys may
be anywhere that can wrap and unwrap a few bytes: `Sealer` is what a key management service offers, `LocalSealer` the
same with keys from the settings.
"""

from __future__ import annotations

import os
import secrets
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from runtime.errors import Misconfigured, Unsealable
from runtime.made_once import made_once
from runtime.settings import SEALING_KEY_BYTES, Settings, sealing_keys

NONCE_BYTES = 12
REMEDY = "Set STENOGATE_SEALING_KEYS, the same for all processes: `echo k1:$(openssl rand -base64 32)` makes one."


@dataclass(frozen=True, slots=True)
class Sealed:
    """A secret at rest: its ciphertext, the data key that opens it, itself sealed, and which master key opens that."""

    ciphertext: bytes
    sealed_key: bytes
    master_key: str


class Sealer(Protocol):
    """Wraps data keys with master keys that it may not be able to show."""

    @property
    def current(self) -> str:
        """The id of the master key that wraps from now on."""

    async def wrap(self, data_key: bytes) -> tuple[bytes, str]:
        """The data key, sealed, and the id of the master key it is sealed with. Raises `Misconfigured`."""

    async def unwrap(self, sealed_key: bytes, master_key: str) -> bytes:
        """The data key. Raises `Unsealable`, `Misconfigured`."""


class LocalSealer:
    """Master keys by their ids, the first the current one: AES-256-GCM, the id as associated data (NIST SP 800-38D)."""

    def __init__(self, keys: Mapping[str, bytes]):
        self._keys = {name: AESGCM(key) for name, key in keys.items()}

    @property
    def current(self) -> str:
        if not self._keys:
            raise Misconfigured(f"There is no key to seal credentials with. {REMEDY}")
        return next(iter(self._keys))

    async def wrap(self, data_key: bytes) -> tuple[bytes, str]:
        name = self.current
        return _encrypted(self._keys[name], data_key, name.encode()), name

    async def unwrap(self, sealed_key: bytes, master_key: str) -> bytes:
        key = self._keys.get(master_key)
        if key is None:
            raise Unsealable(f"It is sealed with the master key `{master_key}`, which STENOGATE_SEALING_KEYS lacks.")
        return _decrypted(key, sealed_key, master_key.encode())


async def seal(sealer: Sealer, secret: str, context: bytes) -> Sealed:
    """The secret, sealed for this context: it opens in no other place than the one that `context` describes.

    Raises `Misconfigured` where there is no master key.
    """
    data_key = AESGCM.generate_key(8 * SEALING_KEY_BYTES)
    sealed_key, master_key = await sealer.wrap(data_key)
    return Sealed(_encrypted(AESGCM(data_key), secret.encode(), context), sealed_key, master_key)


async def unseal(sealer: Sealer, sealed: Sealed, context: bytes) -> str:
    """What was sealed. Raises `Unsealable`, `Misconfigured`."""
    data_key = await sealer.unwrap(sealed.sealed_key, sealed.master_key)
    return _decrypted(AESGCM(data_key), sealed.ciphertext, context).decode()


async def rewrap(sealer: Sealer, sealed: Sealed) -> Sealed:
    """The same with its data key under the current master key. Raises `Unsealable`, `Misconfigured`."""
    data_key = await sealer.unwrap(sealed.sealed_key, sealed.master_key)
    sealed_key, master_key = await sealer.wrap(data_key)
    return Sealed(sealed.ciphertext, sealed_key, master_key)


def sealer_of(settings: Settings) -> Sealer:
    """By the settings' master keys; beside an embedded Postgres by one made once in the data dir. Without any it seals
    nothing: who has no relays needs none."""
    keys = master_keys(settings)
    return LocalSealer({} if keys is None else sealing_keys(keys.get_secret_value()))


def master_keys(settings: Settings) -> SecretStr | None:
    """The setting; where it is unset and Postgres embedded, what the data dir keeps, made now if need be."""
    if settings.sealing_keys is not None or settings.database_url is not None:
        return settings.sealing_keys
    return SecretStr(made_once(settings.data_dir / "sealing.keys", _fresh_master_key))


def _fresh_master_key() -> str:
    return f"{secrets.token_hex(4)}:{b64encode(secrets.token_bytes(SEALING_KEY_BYTES)).decode()}"


def _encrypted(key: AESGCM, plain: bytes, context: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return nonce + key.encrypt(nonce, plain, context)


def _decrypted(key: AESGCM, sealed: bytes, context: bytes) -> bytes:
    try:
        return key.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
    except (InvalidTag, ValueError):  # ValueError: shorter than a nonce
        raise Unsealable from None
