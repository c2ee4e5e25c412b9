"""Voice activity: the Silero model, run incrementally by onnxruntime and numpy.

The model file comes from the `silero-vad` wheel, whose own code (which needs torch) is never imported. Each call sees
the last 64 samples of the frame before it: without them the model silently hears nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dispatchers.errors import BackendUnavailable
from dispatchers.interface import SAMPLE_RATE, Samples

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FRAME = 512
"""Samples per probability: 32 ms."""

_CONTEXT = 64
_STATE_SHAPE = (2, 1, 128)
_MODEL = "silero_vad_16k_op15.onnx"
_FULL_SCALE = np.float32(32_768)


class SileroVad:
    """One loaded model, shared by every stream of the process; safe to use from several threads."""

    def __init__(self, session: InferenceSession):
        self._session = session

    @classmethod
    def load(cls) -> SileroVad:
        """Blocking (about 50 ms). Raises `BackendUnavailable` where the `vad` extra is not installed."""
        spec = importlib.util.find_spec("silero_vad")
        if spec is None or not spec.submodule_search_locations:
            raise BackendUnavailable("Voice activity detection is not installed. Install the `vad` extra.")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        model = Path(spec.submodule_search_locations[0], "data", _MODEL)
        return cls(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))

    def stream(self) -> VadStream:
        """A fresh state, for one stream of audio."""
        return VadStream(self._session)


class VadStream:
    """One stream's state. Not to be used from two threads at once."""

    def __init__(self, session: InferenceSession):
        self._session = session
        self._state = np.zeros(_STATE_SHAPE, np.float32)
        self._window = np.zeros((1, _CONTEXT + FRAME), np.float32)
        self._rate = np.array(SAMPLE_RATE, np.int64)
        self._rest: Samples = np.empty(0, np.int16)

    def feed(self, samples: Samples) -> NDArray[np.float32]:
        """One speech probability for each whole frame; what is left over waits for the next call. Blocking."""
        samples = np.concatenate([self._rest, samples])
        frames = len(samples) // FRAME
        self._rest = samples[frames * FRAME :]
        voiced = samples[: frames * FRAME].reshape(frames, FRAME)
        return np.array([self._probability(frame) for frame in voiced], np.float32)

    def _probability(self, frame: Samples) -> np.float32:
        window = self._window
        window[:, :_CONTEXT] = window[:, -_CONTEXT:]
        window[:, _CONTEXT:] = frame / _FULL_SCALE
        inputs = {"input": window, "state": self._state, "sr": self._rate}
        probability, self._state = self._session.run(None, inputs)
        return np.float32(probability[0, 0])
