"""`python -m tests.benchmarks.gpu`: what batching gains with a Whisper of the shape of large-v3-turbo, and up to where.

The weights are random, so nothing is downloaded and nothing is recognised: a decoder position after a fixed number of
tokens points at the end of text, so that each window costs the same as in a real model that says so much. So many
sessions in a closed loop each have a clip transcribed, one worker, with batches of one and of more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dispatchers.audio.decode import load
from dispatchers.backends.local import LocalBackend
from dispatchers.engine.models import MICRO, MICRO_SAMPLES, ModelSpec
from dispatchers.interface import Options
from tests.benchmarks.stream import percentile

REMEDY = """No CUDA device is visible to CTranslate2 here. Run this on a machine with an NVIDIA GPU, its driver and the
`engine-gpu` extra (CUDA 12 libraries), or try the path on this machine with --device cpu --shape tiny."""
TEXT_TOKENS = 24
PROMPT_TOKENS = 3
SPREAD = 0.02
CLIP = MICRO_SAMPLES / "clip02.wav"


@dataclass(frozen=True)
class Shape:
    width: int
    heads: int
    encoder: int
    decoder: int
    mels: int
    words: int

    @property
    def hidden(self) -> int:
        return 4 * self.width


SHAPES = {"turbo": Shape(1280, 20, 32, 4, 128, 50_257), "tiny": Shape(64, 2, 2, 1, 128, 900)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="turbo")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32, 64], help="the first is compared with")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each figure")
    given = parser.parse_args()
    import ctranslate2

    if given.device == "cuda" and ctranslate2.get_cuda_device_count() == 0:
        raise SystemExit(REMEDY)
    console = Console(width=150)
    with tempfile.TemporaryDirectory(prefix="stenogate-gpu-") as folder:
        made = random_whisper(Path(folder), SHAPES[given.shape], given.device)
        asyncio.run(_measure(console, made, given))


# --- the measurement ---


async def _measure(console: Console, spec: ModelSpec, given: argparse.Namespace) -> None:
    table = Table("sessions", *(f"batches of {size}" for size in given.batches), title=f"{spec.name} on {given.device}")
    rows: dict[int, list[str]] = {count: [] for count in given.sessions}
    first: dict[int, float] = {}
    for size in given.batches:
        backend = LocalBackend(spec, workers=1, device=given.device, batch_limit=size, queue_limit=1024)
        await backend.transcribe(load(CLIP), _options(0))  # loads and warms
        for count in given.sessions:
            rate, late = await _closed_loop(backend, count, given.seconds)
            gain = rate / first.setdefault(count, rate)
            rows[count].append(f"{rate:.1f}/s ({gain:.2f}), p95 {1000 * late:.0f} ms")
        await backend.aclose()
    for count, figures in rows.items():
        table.add_row(str(count), *figures)
    console.print(table)
    console.print(f"Windows a second (times those of batches of {given.batches[0]}) of {TEXT_TOKENS} tokens each.")


async def _closed_loop(backend: LocalBackend, count: int, seconds: float) -> tuple[float, float]:
    """Windows a second, and the 95th percentile of their latencies in s. A round before warms the sizes of batches."""
    clip = load(CLIP)
    over = 0.0
    took: list[float] = []

    async def session(number: int, *, counted: bool) -> None:
        while time.monotonic() < over or not counted:
            began = time.monotonic()
            await backend.transcribe(clip, _options(number))
            if not counted:
                return
            took.append(time.monotonic() - began)

    await asyncio.gather(*(session(number, counted=False) for number in range(count)))
    begun = time.monotonic()
    over = begun + seconds
    await asyncio.gather(*(session(number, counted=True) for number in range(count)))
    return len(took) / (time.monotonic() - begun), percentile(took, 95)


def _options(number: int) -> Options:
    """Without the ladder of temperatures, which random words would climb."""
    return Options(language="en", urgency="final", temperature=0.0, stream=str(number), share=str(number))


# --- the model ---


def random_whisper(folder: Path, shape: Shape, device: str) -> ModelSpec:
    """A CTranslate2 folder of this shape."""
    from ctranslate2.specs.whisper_spec import WhisperSpec

    tokens = _tokenizer(folder, shape.words)
    known = {token: number for number, token in enumerate(tokens)}
    spec = WhisperSpec(shape.encoder, shape.heads, shape.decoder, shape.heads)
    _Weights(shape).fill(spec, len(tokens), end=known["<|endoftext|>"])
    spec.register_vocabulary(tokens)
    micro = json.loads((Path(MICRO.source) / "config.json").read_text())
    moved = shape.words - _words_of_micro()
    spec.config.suppress_ids = [number + moved for number in micro["suppress_ids"]]
    spec.config.suppress_ids_begin = []
    spec.config.lang_ids = [number + moved for number in micro["lang_ids"]]
    spec.config.alignment_heads = [[shape.decoder - 1, 0]]
    spec.validate()
    spec.optimize(quantization="float16" if device == "cuda" else "int8")
    spec.save(str(folder))
    extractor = json.loads((Path(MICRO.source) / "preprocessor_config.json").read_text())
    longer = {"feature_size": shape.mels, "chunk_length": 30, "n_samples": 480_000, "nb_max_frames": 3_000}
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor | longer))
    return ModelSpec(f"random, width {shape.width}", "faster-whisper", str(folder))


def _words_of_micro() -> int:
    tokens: dict[str, int] = json.loads((Path(MICRO.source) / "tokenizer.json").read_text())["model"]["vocab"]
    return len(tokens)


def _tokenizer(folder: Path, words: int) -> list[str]:
    """The micro model's, with as many words more as the shape has; all tokens in the order of their numbers."""
    made = json.loads((Path(MICRO.source) / "tokenizer.json").read_text())
    vocabulary = made["model"]["vocab"]
    more = words - len(vocabulary)
    vocabulary |= {f"filler{number}": number for number in range(len(vocabulary), words)}
    for token in made["added_tokens"]:
        token["id"] += more
    (folder / "tokenizer.json").write_text(json.dumps(made))
    numbered = {number: token for token, number in vocabulary.items()}
    numbered |= {token["id"]: token["content"] for token in made["added_tokens"]}
    tokens = [numbered[number] for number in sorted(numbered)]
    tokens[tokens.index("<|pad|>")] = ""  # how CTranslate2 knows a multilingual Whisper
    return tokens


class _Weights:
    """Random matrices of a shape, the same each time."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._chance = np.random.default_rng(1)

    def fill(self, spec: Any, tokens: int, *, end: int) -> None:
        shape, width = self._shape, self._shape.width
        encoder, decoder = spec.encoder, spec.decoder
        encoder.conv1.weight, encoder.conv1.bias = self._random(width, shape.mels, 3), self._zeros(width)
        encoder.conv2.weight, encoder.conv2.bias = self._random(width, width, 3), self._zeros(width)
        encoder.position_encodings.encodings = self._random(1500, width)
        words = self._random(tokens, width)
        decoder.embeddings.weight = decoder.projection.weight = words
        places = self._random(448, width)
        places[PROMPT_TOKENS + TEXT_TOKENS :] = 100 * words[end]  # from here on nothing is nearer than the end
        decoder.position_encodings.encodings = places
        for half in (encoder, decoder):
            self._norm(half.layer_norm)
            for layer in half.layer:
                self._attention(layer.self_attention, 3)
                if half is decoder:
                    self._attention(layer.attention, 1, 2)
                self._norm(layer.ffn.layer_norm)
                self._linear(layer.ffn.linear_0, shape.hidden, width)
                self._linear(layer.ffn.linear_1, width, shape.hidden)

    def _attention(self, attention: Any, *widths: int) -> None:
        self._norm(attention.layer_norm)
        for linear, times in zip(attention.linear, (*widths, 1), strict=True):
            self._linear(linear, times * self._shape.width, self._shape.width)

    def _linear(self, linear: Any, out: int, into: int) -> None:
        linear.weight, linear.bias = self._random(out, into), self._zeros(out)

    def _norm(self, norm: Any) -> None:
        norm.gamma, norm.beta = np.ones(self._shape.width, np.float32), self._zeros(self._shape.width)

    def _random(self, *shape: int) -> NDArray[np.float32]:
        return self._chance.standard_normal(shape, np.float32) * np.float32(SPREAD)

    def _zeros(self, size: int) -> NDArray[np.float32]:
        return np.zeros(size, np.float32)


if __name__ == "__main__":
    main()
