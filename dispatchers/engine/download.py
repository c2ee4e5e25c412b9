"""Models from the Hugging Face hub, and how far their download is."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def download(
    repository: str,
    files: Sequence[str],
    cache_dir: Path | None,
    told: Callable[[int], None],
    endpoint: str | None = None,
) -> Path:
    """The folder of the repository's files, those that match one of the patterns `files`; only what is missing is
    fetched. `told` gets how much of that is here, in whole per cent, never less than before, in any thread. There is a
    bar where standard error is a terminal. Blocks. Raises what the hub's library raises.
    """
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    progress = _Progress(told)

    class Bar(tqdm):  # type: ignore[misc]
        """The library has three: of files, of bytes received, and of bytes on the disk. The last one counts."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = str(kwargs.get("desc", "")).startswith("Reconstructing")
            super().__init__(*args, **{**kwargs, "disable": not sys.stderr.isatty()})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts:
                progress.add(int(n or 0))
            shown: bool | None = super().update(n)
            return shown

    wanted: dict[str, Any] = {"cache_dir": cache_dir, "allow_patterns": list(files), "endpoint": endpoint}
    found = snapshot_download(repository, **wanted, tqdm_class=Bar, dry_run=True)
    progress.expect(sum(file.file_size or 0 for file in found if file.will_download))
    return Path(snapshot_download(repository, **wanted, tqdm_class=Bar))


class _Progress:
    """Bytes as per cent of what is expected; several threads add to it."""

    def __init__(self, told: Callable[[int], None]) -> None:
        self._told = told
        self._total = self._here = self._percent = 0
        self._lock = threading.Lock()
        told(0)

    def expect(self, total: int) -> None:
        self._total = total

    def add(self, count: int) -> None:
        with self._lock:
            self._here += count
            percent = min(100 * self._here // self._total, 100) if self._total else 0
            if percent > self._percent:
                self._percent = percent
                self._told(percent)
