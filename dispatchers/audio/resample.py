"""Live PCM at the caller's rate, brought to 16 kHz without seams between messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from dispatchers.errors import UnsupportedAudio
from dispatchers.interface import SAMPLE_RATE, Samples

if TYPE_CHECKING:
    from av import AudioFrame, AudioResampler

RATES_HZ = range(8_000, 48_001)
_SAMPLE_BYTES = 2
_NOTHING: Samples = np.empty(0, np.int16)


class Resampler:
    """Takes `pcm_s16le` at `rate` Hz (8 000 to 48 000, else `UnsupportedAudio`) in byte strings of any length and gives
    samples at 16 kHz; of two channels, their mean, or where they are kept `apart` both, in the shape (length, 2). An
    incomplete sample waits for its rest; the filter's memory reaches across messages."""

    def __init__(self, rate: int, channels: Literal[1, 2] = 1, *, apart: bool = False):
        if rate not in RATES_HZ:
            raise UnsupportedAudio(f"The sample rate must be between {RATES_HZ[0]} and {RATES_HZ[-1]} Hz.")
        self._rate = rate
        self._layout = "mono" if channels == 1 else "stereo"
        self._sample_bytes = _SAMPLE_BYTES * channels
        self._odd = b""
        self._given = 2 if apart and channels == 2 else 1
        self._converter = None if rate == SAMPLE_RATE and channels == self._given else converter(self._given)

    def feed(self, data: bytes) -> Samples:
        """What can be given out so far; the last few samples stay in the filter until the next call."""
        data = self._odd + data
        whole = len(data) - len(data) % self._sample_bytes
        self._odd = data[whole:]
        samples = np.frombuffer(data[:whole], dtype="<i2").astype(np.int16, copy=False)
        if self._converter is None or not len(samples):
            return shaped(samples, self._given)
        from av import AudioFrame

        frame = AudioFrame.from_ndarray(samples[np.newaxis], format="s16", layout=self._layout)
        frame.sample_rate = self._rate
        return self._joined(self._converter.resample(frame))

    def flush(self) -> Samples:
        """The filter's remainder. A last incomplete sample is dropped. The resampler is fresh afterwards."""
        self._odd = b""
        if self._converter is None:
            return shaped(_NOTHING, self._given)
        rest = self._joined(self._converter.resample(None))
        self._converter = converter(self._given)
        return rest

    def _joined(self, frames: list[AudioFrame]) -> Samples:
        return shaped(np.concatenate([_NOTHING, *(frame.to_ndarray()[0] for frame in frames)]), self._given)


def converter(channels: int) -> AudioResampler:
    """To 16-bit samples at 16 kHz, of two channels interleaved. Its filter runs over each channel for itself."""
    from av import AudioResampler

    return AudioResampler(format="s16", layout="mono" if channels == 1 else "stereo", rate=SAMPLE_RATE)


def shaped(interleaved: Samples, channels: int) -> Samples:
    """The same samples as `Pcm` has them."""
    return interleaved if channels == 1 else interleaved.reshape(-1, channels)


def mixed(samples: Samples) -> Samples:
    """One channel: of two kept apart, their mean."""
    return samples if samples.ndim == 1 else samples.mean(axis=1).astype(np.int16)
