"""A CTranslate2 Whisper model whose calls members of a `Meeting` make together.

It stands where faster-whisper keeps its model, so prompts, gates and the temperature ladder stay faster-whisper's own.
Encoding, language detection and decoding at temperature 0 are batched; sampling (the ladder's retries) and word
alignment are done alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dispatchers.engine.meeting import Meeting


class Place(threading.local):
    """What a thread is busy with: its meeting, what it asks before each window, and the window whose language it has
    just detected."""

    meeting: Meeting | None = None
    before_window: Callable[[], object] | None = None
    detecting: bool = False
    window: tuple[NDArray[np.float32], Encoded] | None = None


@dataclass(eq=False, slots=True)
class _Batch:
    """What the encoder made of several windows, on its device: (windows, frames ÷ 2, width)."""

    storage: Any
    windows: int
    copied: NDArray[np.float32] | None = None

    def on_host(self) -> NDArray[np.float32]:
        import ctranslate2

        if self.copied is None:
            on_cpu = self.storage.to_device(ctranslate2.Device.cpu)
            self.copied = np.array(on_cpu.to(ctranslate2.DataType.float32))
        return self.copied


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """One window of a batch."""

    batch: _Batch
    at: int

    def alone(self) -> Any:
        """In the model's own terms."""
        return _storage([self])


def _storage(windows: Sequence[Encoded]) -> Any:
    """The windows as one batch. Nothing is copied when they are a whole batch in its order."""
    batch = windows[0].batch
    if [(window.batch, window.at) for window in windows] == [(batch, at) for at in range(batch.windows)]:
        return batch.storage
    import ctranslate2

    return ctranslate2.StorageView.from_array(np.stack([window.batch.on_host()[window.at] for window in windows]))


class TogetherModel:
    """`model`, a `ctranslate2.models.Whisper`, for members of the meeting in which their thread has its place."""

    def __init__(self, model: Any, place: Place, sot: int) -> None:
        self._model = model
        self._place = place
        self._sot = sot

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_window(self, window: NDArray[np.float32], encode: Callable[[NDArray[np.float32]], Any]) -> Encoded:
        """One window (mels, frames), by `encode`, which takes several of equal length (windows, mels, frames)."""

        def together(windows: Sequence[NDArray[np.float32]]) -> list[Encoded]:
            batch = _Batch(encode(np.stack(windows)), len(windows))
            return [Encoded(batch, at) for at in range(len(windows))]

        encoded: Encoded = self._meet(("encode", window.shape), window, together)
        return encoded

    def detect_language(self, window: Encoded) -> list[Any]:
        """As the model's own, for one window."""

        def together(windows: Sequence[Encoded]) -> list[Any]:
            return _in_order(
                windows, lambda ordered: self._model.detect_language(_storage([windows[i] for i in ordered]))
            )

        return [self._meet(("detect", _shape(window)), window, together)]

    def generate(self, window: Encoded, prompts: list[list[int]], **settings: Any) -> list[Any]:
        """As the model's own, for one window. Prompts of a batch must have their start in one place, and one length."""
        if "sampling_temperature" in settings:
            results: list[Any] = self._model.generate(window.alone(), prompts, **settings)
            return results
        [prompt] = prompts

        def together(asked: Sequence[tuple[Encoded, list[int]]]) -> list[Any]:
            windows = [window for window, _ in asked]
            return _in_order(
                windows,
                lambda ordered: self._model.generate(
                    _storage([windows[i] for i in ordered]), [asked[i][1] for i in ordered], **settings
                ),
            )

        kind = ("generate", _shape(window), len(prompt), prompt.index(self._sot), repr(sorted(settings.items())))
        return [self._meet(kind, (window, prompt), together)]

    def align(self, window: Encoded, *arguments: Any, **settings: Any) -> Any:
        """As the model's own, for one window."""
        return self._model.align(window.alone(), *arguments, **settings)

    def _meet(self, kind: Any, argument: Any, together: Callable[[Sequence[Any]], Sequence[Any]]) -> Any:
        meeting = self._place.meeting or Meeting()
        return meeting.call(kind, argument, together)


def _shape(window: Encoded) -> tuple[int, ...]:
    return tuple(window.batch.storage.shape[1:])


def _in_order(windows: Sequence[Encoded], ask: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
    """The answers of `ask`, which is given the windows' places in the order in which they were encoded."""
    ordered = sorted(range(len(windows)), key=lambda i: (id(windows[i].batch), windows[i].at))
    answers = dict(zip(ordered, ask(ordered), strict=True))
    return [answers[i] for i in range(len(windows))]
