"""The key that signs gateway-issued tokens."""

from __future__ import annotations

import os
import secrets

from runtime.settings import Settings


def signing_key(settings: Settings) -> bytes:
    """The operator's key; else one made at the first start and kept, readable by its owner only, in the data dir."""
    if settings.signing_key is not None:
        return settings.signing_key.get_secret_value().encode()
    path = settings.data_dir / "signing.key"
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.touch(mode=0o600)
    try:
        fresh.write_text(secrets.token_hex(32))
        os.link(fresh, path)  # atomic, and fails if another process was first: its key then counts
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return path.read_text().encode()
