"""Secrets that an installation makes for itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def made_once(path: Path, make: Callable[[], str]) -> str:
    """The file's text; made at the first need, and kept readable by its owner only."""
    if path.exists():
        return path.read_text()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.touch(mode=0o600)
    try:
        fresh.write_text(make())
        os.link(fresh, path)  # atomic, and fails if another process was first: its text then counts
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return path.read_text()
