"""Live PCM at the caller's rate, made mono at 16 kHz without seams between messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from dispatchers.errors import UnsupportedAudio
from dispatchers.interface import SAMPLE_RATE, Samples

if TYPE_CHECKING:
    from av import AudioFrame, AudioResampler

RATES_HZ = range(8_000, 48_001)
_SAMPLE_BYTES = 2


class Resampler:
    """Takes `pcm_s16le` at `rate` Hz (8 000 to 48 000, else `UnsupportedAudio`) in byte strings of any length and gives
    samples at 16 kHz; of two channels, their mean. An incomplete sample waits for its rest; the filter's memory reaches
    across messages."""

    def __init__(self, rate: int, channels: Literal[1, 2] = 1):
        if rate not in RATES_HZ:
            raise UnsupportedAudio(f"The sample rate must be between {RATES_HZ[0]} and {RATES_HZ[-1]} Hz.")
        self._rate = rate
        self._layout = "mono" if channels == 1 else "stereo"
        self._sample_bytes = _SAMPLE_BYTES * channels
        self._odd = b""
        self._converter = None if rate == SAMPLE_RATE and channels == 1 else _converter()

    def feed(self, data: bytes) -> Samples:
        """What can be given out so far; the last few samples stay in the filter until the next call."""
        data = self._odd + data
        whole = len(data) - len(data) % self._sample_bytes
        self._odd = data[whole:]
        samples = np.frombuffer(data[:whole], dtype="<i2").astype(np.int16, copy=False)
        if self._converter is None or not len(samples):
            return samples
        from av import AudioFrame

        frame = AudioFrame.from_ndarray(samples[np.newaxis], format="s16", layout=self._layout)
        frame.sample_rate = self._rate
        return _joined(self._converter.resample(frame))

    def flush(self) -> Samples:
        """The filter's remainder. A last incomplete sample is dropped. The resampler is fresh afterwards."""
        self._odd = b""
        if self._converter is None:
            return np.empty(0, np.int16)
        rest = _joined(self._converter.resample(None))
        self._converter = _converter()
        return rest


def _joined(frames: list[AudioFrame]) -> Samples:
    return np.concatenate([np.empty(0, np.int16), *(frame.to_ndarray()[0] for frame in frames)])


def _converter() -> AudioResampler:
    from av import AudioResampler

    return AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
