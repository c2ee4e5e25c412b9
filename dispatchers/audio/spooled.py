"""A part of a recording while it is written and waits to be stored: flac in a file without a name. Blocking."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

from dispatchers.audio.encode import Encoder, encoder
from dispatchers.interface import Samples


class SpooledPart:
    """Begins at the sample `start` of its session. `stored_as`: its number and key, once it has them."""

    def __init__(self, start: int):
        self.start = start
        self.samples = 0
        self.stored_as: tuple[int, str] | None = None
        self._file: IO[bytes] | None = None
        self._encoder: Encoder | None = None

    @property
    def end(self) -> int:
        return self.start + self.samples

    def add(self, samples: Samples, folder: Path) -> None:
        if self._file is None or self._encoder is None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file, self._encoder = tempfile.TemporaryFile(dir=folder), encoder("flac")  # noqa: SIM115  held until `drop`
        self._file.write(self._encoder.feed(samples))
        self.samples += len(samples)

    def finish(self) -> None:
        if self._file is not None and self._encoder is not None:
            self._file.write(self._encoder.end())
            self._file.flush()
            self._encoder = None

    def content(self) -> bytes:
        if self._file is None:
            return b""
        self._file.seek(0)
        return self._file.read()

    def drop(self) -> None:
        if self._file is not None:
            self._file.close()
