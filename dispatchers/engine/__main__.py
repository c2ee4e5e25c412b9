"""`python -m dispatchers.engine SOCKET`: the engine as a child of a gateway, as its environment wants it."""

from __future__ import annotations

import sys
from pathlib import Path

from dispatchers.backends.local import LocalBackend
from dispatchers.engine.child import run
from dispatchers.local import choose_model, local_backend
from runtime.settings import Settings
from runtime.telemetry import configure_logging


def main(path: str) -> int:
    """Returns the exit status."""
    settings = Settings()
    configure_logging(settings.log_level, settings.log_format)

    def build() -> tuple[LocalBackend, str]:
        chosen = choose_model(settings)
        return local_backend(settings, chosen), chosen.reason

    return run(build, Path(path), max_upload_bytes=settings.max_upload_bytes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
