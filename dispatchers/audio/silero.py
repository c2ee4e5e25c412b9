"""The Silero voice activity model (v6, 16 kHz) as matrix products over many windows at once.

Its convolutions see four time steps or fewer, for which onnxruntime's are slow. Here each is a few products over all
windows together, the steps in the padding left out, and all but the recurrence is computed for every window of a call
at once: a third of the time. The weights are read from the packaged file, a protocol buffer of whose fields we need
five (onnx.proto3: `ModelProto.graph` 7, `GraphProto.initializer` 5, `TensorProto.dims` 1, `name` 8, `raw_data` 9).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

WINDOW = 576
"""Samples the model sees for one probability: 64 of context and a frame of 512."""

HIDDEN = 128

Floats: TypeAlias = NDArray[np.float32]

_STFT, _HOP, _BINS, _STEPS = 256, 128, 129, 4
_HALF_STFT = _STFT // 2
_REFLECTED = slice(WINDOW - 2, WINDOW - 66, -1)  # 64 samples, the last one not repeated
_ROWS = 4
_FULL_SCALE = np.float32(1 / 32_768)
_HALF = np.float32(0.5)


class Silero:
    """The model. Used from one thread at a time; the same windows give the same to 1e-5 however they are batched.

    How a product is rounded depends on how many rows it has and on the processor. Hence whole fours of rows, and double
    precision in the one layer where rounding shows: in single precision probabilities differed by up to 2.2e-5."""

    def __init__(self, weights: dict[str, Floats]):
        # its window is symmetric and begins with 0, so cosines are of sums, and sines of differences, of two samples
        basis = weights["model.stft.forward_basis_buffer"][:, 0, 1 : _HALF_STFT + 1].T
        self._cosines = np.ascontiguousarray(basis[:, :_BINS])
        self._sines = np.ascontiguousarray(basis[:-1, _BINS:])
        self._first, self._third, self._fourth = (_by_step(*_convolution(weights, layer)) for layer in (0, 2, 3))
        weight, self._second_bias = _convolution(weights, 1)
        weight = weight.astype(np.float64)
        self._second_begin, self._second = _flat(weight[1:].swapaxes(0, 1)), _flat(weight.swapaxes(0, 1))
        # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2, so with three of the four gates halved one tanh serves them all
        halved = np.repeat(np.array([0.5, 0.5, 1.0, 0.5], np.float32), HIDDEN)
        self._into = np.ascontiguousarray((weights["model.decoder.rnn.weight_ih"] * halved[:, None]).T)
        self._again = np.ascontiguousarray((weights["model.decoder.rnn.weight_hh"] * halved[:, None]).T)
        self._gates = (weights["model.decoder.rnn.bias_ih"] + weights["model.decoder.rnn.bias_hh"]) * halved
        self._out = weights["model.decoder.decoder.2.weight"].ravel() * _HALF
        self._bias = weights["model.decoder.decoder.2.bias"] * _HALF

    @classmethod
    def read(cls, path: Path) -> Silero:
        """From `silero_vad_16k_op15.onnx`. Blocking; a few ms."""
        [graph] = _parts(memoryview(path.read_bytes()), 7)
        return cls(dict(map(_tensor, _parts(graph, 5))))

    def gates(self, windows: NDArray[np.int16]) -> Floats:
        """What windows (n × 576) put into the recurrence: n × 512."""
        return self._gates_of(np.pad(windows, ((0, -len(windows) % _ROWS), (0, 0))))[: len(windows)]

    def _gates_of(self, windows: NDArray[np.int16]) -> Floats:
        spectrum = self._spectrum(windows)
        weight, bias = self._first  # 3 steps of 129 in; of the first and last step one lies in the padding
        layer: Floats = np.empty((len(windows), _STEPS, HIDDEN), np.float32)
        np.matmul(spectrum[:, : 2 * _BINS], weight[_BINS:], out=layer[:, 0])
        np.matmul(spectrum[:, : 3 * _BINS], weight, out=layer[:, 1])
        np.matmul(spectrum[:, _BINS:], weight, out=layer[:, 2])
        np.matmul(spectrum[:, 2 * _BINS :], weight[: 2 * _BINS], out=layer[:, 3])
        # every other step, channel by channel as the graph does it
        steps = _relu(layer, bias).swapaxes(1, 2).astype(np.float64)
        exact = np.empty((len(windows), 2, 64))
        np.matmul(steps[:, :, :2].reshape(len(windows), -1), self._second_begin, out=exact[:, 0])
        np.matmul(steps[:, :, 1:].reshape(len(windows), -1), self._second, out=exact[:, 1])
        second = _relu(exact.astype(np.float32), self._second_bias).reshape(len(windows), -1)
        weight, bias = self._third
        third = _relu(second @ weight[64:], bias)
        weight, bias = self._fourth  # one step is left, between two of padding
        gates: Floats = _relu(third @ weight[64:128], bias) @ self._into
        gates += self._gates
        return gates

    def step(self, gates: Floats, state: Floats) -> Floats:
        """The recurrence, one window further for each of n streams: from 2 × n × 128 to the same."""
        hidden, cell = state
        told = np.tanh(gates + hidden @ self._again)
        enter, keep, leave = (_HALF * told[:, at : at + HIDDEN] + _HALF for at in (0, HIDDEN, 3 * HIDDEN))
        cell = keep * cell + enter * told[:, 2 * HIDDEN : 3 * HIDDEN]
        return np.stack([leave * np.tanh(cell), cell])

    def probabilities(self, hidden: Floats) -> Floats:
        """Of speech: from … × 128 to …"""
        told: Floats = _HALF * np.tanh(np.maximum(hidden, 0) @ self._out + self._bias) + _HALF
        return told

    def _spectrum(self, windows: NDArray[np.int16]) -> Floats:
        """Magnitudes, n × (4 · 129)."""
        audio = np.concatenate([windows, windows[:, _REFLECTED]], axis=1) * _FULL_SCALE
        count, size = len(audio), audio.itemsize
        steps = np.ndarray((count, _STEPS, _STFT), np.float32, audio, 0, (audio.strides[0], _HOP * size, size))
        before, after = steps[:, :, 1:_HALF_STFT], steps[:, :, :_HALF_STFT:-1]
        even = np.empty((count, _STEPS, _HALF_STFT), np.float32)
        np.add(before, after, out=even[:, :, :-1])
        even[:, :, -1] = steps[:, :, _HALF_STFT]
        spectrum: Floats = even.reshape(-1, _HALF_STFT) @ self._cosines
        imaginary = (before - after).reshape(-1, _HALF_STFT - 1) @ self._sines
        np.square(spectrum, out=spectrum)
        spectrum += np.square(imaginary, out=imaginary)
        return np.sqrt(spectrum, out=spectrum).reshape(count, -1)


def _relu(layer: Floats, bias: Floats) -> Floats:
    layer += bias
    return np.maximum(layer, 0, out=layer)


def _convolution(weights: dict[str, Floats], layer: int) -> tuple[Floats, Floats]:
    """Weight as 3 steps × channels in × channels out, and bias."""
    name = f"model.encoder.{layer}.reparam_conv"
    return weights[f"{name}.weight"].transpose(2, 1, 0), weights[f"{name}.bias"]


def _by_step(weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
    return _flat(weight), bias


def _flat(weight: Floats) -> Floats:
    """As what a product takes."""
    return np.ascontiguousarray(weight.reshape(-1, weight.shape[2]))


def _tensor(data: memoryview) -> tuple[str, Floats]:
    shape = [value for number, value in _fields(data) if number == 1 and isinstance(value, int)]
    [name], [values] = _parts(data, 8), _parts(data, 9)
    return str(name, "utf-8"), np.frombuffer(values, "<f4").reshape(shape).astype(np.float32, copy=False)


def _parts(data: memoryview, number: int) -> list[memoryview]:
    return [value for field, value in _fields(data) if field == number and isinstance(value, memoryview)]


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """A protocol buffer's fields: numbers and values, integers or bytes."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = integer()
        match key & 7:
            case 0:
                yield key >> 3, integer()
            case 2:
                size = integer()
                yield key >> 3, data[at : at + size]
                at += size
            case kind:
                raise ValueError(f"no field of wire type {kind} is expected here")
