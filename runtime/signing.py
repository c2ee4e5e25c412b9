"""The key that signs gateway-issued tokens."""

from __future__ import annotations

import secrets

from runtime.made_once import made_once
from runtime.settings import Settings


def signing_key(settings: Settings) -> bytes:
    """The operator's key; else one made at the first start and kept, readable by its owner only, in the data dir."""
    if settings.signing_key is not None:
        return settings.signing_key.get_secret_value().encode()
    return made_once(settings.data_dir / "signing.key", lambda: secrets.token_hex(32)).encode()
