"""Voice activity: the Silero model, run incrementally for many streams together.

The model's weights come from the `silero-vad` wheel, whose own code (which needs torch) is never imported. Each call
sees the last 64 samples of the frame before it: without them the model silently hears nothing.

One thread serves every stream in rounds: it takes up to `_BATCH` pieces of audio that wait and a few frames of each.
Rounds start a little apart, so that batches fill when there are many streams; a lone stream never waits.
"""

from __future__ import annotations

import asyncio
import importlib.util
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dispatchers.audio.silero import HIDDEN, WINDOW, Floats, Silero
from dispatchers.errors import BackendUnavailable
from dispatchers.interface import Samples

FRAME = 512
"""Samples per probability: 32 ms."""

Probabilities: TypeAlias = NDArray[np.float32]

_CONTEXT = WINDOW - FRAME
_MODEL = "silero_vad_16k_op15.onnx"

_BATCH = 64
_TURN = 4  # frames of one piece in a round: all of a message of 100 ms
_APART_S = 0.012


class SileroVad:
    """One loaded model, shared by every stream of the process. Its thread starts with the first audio."""

    def __init__(self, model: Silero):
        self._model = model
        self._thread = ThreadPoolExecutor(1, "vad")
        self._lock = threading.Lock()
        self._waiting: deque[_Piece] = deque()  # at most one for each stream
        self._awake = False
        self._not_before = 0.0

    @classmethod
    def load(cls) -> SileroVad:
        """Blocking (a few ms). Raises `BackendUnavailable` where the `vad` extra is not installed."""
        spec = importlib.util.find_spec("silero_vad")
        if spec is None or not spec.submodule_search_locations:
            raise BackendUnavailable("Voice activity detection is not installed. Install the `vad` extra.")
        return cls(Silero.read(Path(spec.submodule_search_locations[0], "data", _MODEL)))

    def stream(self) -> VadStream:
        """A fresh state, for one stream of audio."""
        return VadStream(self)

    def close(self) -> None:
        """Ends the thread once what was asked is answered. No stream is to be fed afterwards."""
        self._thread.shutdown(wait=False)

    def ask(self, piece: _Piece) -> None:
        """Puts a piece in line; bookkeeping only."""
        with self._lock:
            self._waiting.append(piece)
            if not self._awake:
                self._thread.submit(self._work)
                self._awake = True

    # --- in the thread ---

    def _work(self) -> None:
        """Rounds until nothing waits."""
        unfinished = False
        while True:
            if not unfinished:
                time.sleep(max(0.0, self._not_before - time.monotonic()))
            self._not_before = time.monotonic() + _APART_S
            with self._lock:
                batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
                if not batch:
                    self._awake = False
                    return
            unfinished = self._round([piece for piece in batch if not piece.answer.cancelled()])

    def _round(self, batch: list[_Piece]) -> bool:
        """A turn of each piece, answered if it was the last; whether pieces were left unfinished."""
        if not batch:
            return False
        try:
            self._hear(batch)
        except Exception as exc:  # noqa: BLE001 — raised where the streams wait
            _tell(batch, exc)
            return False
        _tell([piece for piece in batch if not piece.left])
        unfinished = [piece for piece in batch if piece.left]
        with self._lock:
            self._waiting.extend(unfinished)
        return bool(unfinished)

    def _hear(self, batch: list[_Piece]) -> None:
        batch.sort(key=lambda piece: piece.left, reverse=True)  # those with fewer frames drop out at the end
        turns = np.array([min(piece.left, _TURN) for piece in batch])
        gates = self._model.gates(
            np.concatenate([piece.windows(turn) for piece, turn in zip(batch, turns, strict=True)])
        )
        begins = np.cumsum(turns) - turns
        state = np.stack([piece.state for piece in batch], axis=1)
        hidden = np.zeros((turns[0], len(batch), HIDDEN), np.float32)
        for step in range(turns[0]):
            going = int((turns > step).sum())
            state[:, :going] = self._model.step(gates[begins[:going] + step], state[:, :going])
            hidden[step, :going] = state[0, :going]
        probabilities = self._model.probabilities(hidden)
        for at, (piece, turn) in enumerate(zip(batch, turns.tolist(), strict=True)):
            piece.said.append(probabilities[:turn, at])
            piece.left -= turn
            piece.state = state[:, at].copy()


class VadStream:
    """One stream's state."""

    def __init__(self, vad: SileroVad):
        self._vad = vad
        self._state = np.zeros((2, HIDDEN), np.float32)
        self._rest: Samples = np.zeros(_CONTEXT, np.int16)  # the context, then what has not filled a frame

    async def feed(self, samples: Samples) -> Probabilities:
        """One speech probability for each whole frame; what is left over waits for the next call. One call at a time;
        after one that was cancelled there must be no other."""
        before, there = self._rest, len(self._rest) + len(samples)
        frames = (there - _CONTEXT) // FRAME
        kept = there - frames * FRAME
        if kept <= len(samples):
            self._rest = samples[len(samples) - kept :]
        else:
            self._rest = np.concatenate([before, samples])[frames * FRAME :]
        if not frames:
            return np.empty(0, np.float32)
        piece = _Piece(before, samples, frames, self._state, asyncio.get_running_loop().create_future())
        self._vad.ask(piece)
        await piece.answer
        self._state = piece.state
        return piece.said[0] if len(piece.said) == 1 else np.concatenate(piece.said)


@dataclass(slots=True, eq=False)
class _Piece:
    """Audio of one stream: `frames` whole frames, the context before them, which begins in what was kept `before`, and
    the model's state at its end so far."""

    before: Samples
    samples: Samples
    frames: int
    state: Floats
    answer: asyncio.Future[None]
    said: list[Probabilities] = field(default_factory=list)
    left: int = field(init=False)
    heard: Samples | None = None  # all of it, joined in the thread

    def __post_init__(self) -> None:
        self.left = self.frames

    def windows(self, count: int) -> Samples:
        """The next frames, each with its context."""
        if self.heard is None:
            self.heard = np.concatenate([self.before, self.samples])
        size = self.heard.itemsize
        begin = (self.frames - self.left) * FRAME * size
        return np.ndarray((count, WINDOW), np.int16, self.heard, begin, (FRAME * size, size))


def _tell(pieces: list[_Piece], failure: Exception | None = None) -> None:
    """Answers the streams in their event loops: one call for each loop."""
    for loop in {piece.answer.get_loop() for piece in pieces}:
        answers = [piece.answer for piece in pieces if piece.answer.get_loop() is loop]
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(_settle, answers, failure)


def _settle(answers: list[asyncio.Future[None]], failure: Exception | None) -> None:
    for answer in answers:
        if answer.done():
            continue
        if failure is None:
            answer.set_result(None)
        else:
            answer.set_exception(failure)
