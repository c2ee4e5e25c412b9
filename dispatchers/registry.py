"""Backends by name. A backend is imported when it is chosen, so that what is not used is never loaded."""

from __future__ import annotations

from importlib import import_module
from typing import Any

BACKENDS: dict[str, str] = {
    "local": "dispatchers.backends.local:LocalBackend",
    "scripted": "dispatchers.backends.scripted:Scripted",
}


def load_backend(name: str) -> type[Any]:
    """The backend's class. Raises `LookupError` for a name that is not in `BACKENDS`."""
    module, _, attribute = BACKENDS[name].partition(":")
    backend: type[Any] = getattr(import_module(module), attribute)
    return backend
