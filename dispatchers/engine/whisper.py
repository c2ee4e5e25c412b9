"""faster-whisper: Whisper models by CTranslate2.

Four things differ from `WhisperModel` as it comes. faster-whisper pads every window to 30 s, and encoding that padding
is nearly all the cost of a short utterance; here it is cut to what the model was shown to need
(`ModelSpec.shortest_window`). The window whose language was detected is not encoded a second time. Threads go where
they help: see `threads`. And short pieces that run in one `Meeting` are encoded and decoded in batches.

`vad_filter` stays off. An utterance of a stream has been through a VAD already. For a recording it gained nothing where
it could be measured (a minute of the micro samples: 0.9 % word error without it, 0.9 to 1.7 % with it, and a fifth more
time), and it holds a second copy of the audio. Whisper's own gates against silence stay on, but noise and tones pass
them: what of a recording the model is unsure of must have a voice in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from dispatchers.adapters.credence import credible, doubtful
from dispatchers.engine.interface import Recognised
from dispatchers.engine.meeting import Meeting
from dispatchers.engine.memory import keep_memory
from dispatchers.engine.models import STOCK_WINDOW, ModelSpec
from dispatchers.engine.together import Encoded, Place, TogetherModel
from dispatchers.errors import BackendUnavailable, UnsupportedOption
from dispatchers.interface import SAMPLES_PER_MS, Heard, Options, Samples, Segment, Word, to_ms

if TYPE_CHECKING:
    from faster_whisper import WhisperModel

_FULL_SCALE = np.float32(32768)
_SMALL_BYTES = 200_000_000
_THREADS_OF_A_LARGE_MODEL = 4
_BEAM = 5
_HINT_TOKENS = 100
_SAMPLES_PER_FRAME = 160
_BATCH_ON_GPU = 16
_BATCH_ON_CPU = 1
"""Measured with the micro model (docs/benchmarks.md): little CPU is saved, and the first waits for the last."""
_BEFORE_TOKENS = 224
_STEP = 250
_VAD_FRAME = 512
_VOICE = 0.5
_VOICED_FRAMES = 4  # 128 ms
_SHORTEST_MS = 500  # segments' times are guessed, and some have no length


def threads(cores: int, model_bytes: int) -> tuple[int, int]:
    """(workers, threads of each). A model up to the size of `base` loses more to the hand-over between threads than it
    gains (its decoder ran ten times faster with one), so it gets as many workers as cores; a larger one gets workers
    of four threads."""
    if model_bytes <= _SMALL_BYTES:
        return cores, 1
    workers = max(1, cores // _THREADS_OF_A_LARGE_MODEL)
    return workers, cores // workers


class WhisperEngine:
    """A Whisper model in memory. `folder` holds its files; `compute_type` "default" is int8 on a CPU, float16 on a GPU.
    `shortest_window` overrides the model's own (3000 frames: padded as faster-whisper does); `batch_limit` None goes by
    the device.

    Raises `BackendUnavailable` when it cannot be loaded."""

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        *,
        device: str = "auto",
        compute_type: str = "default",
        cores: int | None = None,
        shortest_window: int | None = None,
        batch_limit: int | None = None,
    ) -> None:
        self.spec = spec
        self._shortest = shortest_window or spec.shortest_window
        self._place = Place()
        size = (folder / "model.bin").stat().st_size
        self.workers, per_worker = threads(cores or os.cpu_count() or 1, size)
        try:
            self._model = _load(
                folder,
                device=device,
                compute_type=compute_type,
                workers=self.workers,
                threads_per_worker=per_worker,
                shortest_window=self._shortest,
                place=self._place,
            )
        except (RuntimeError, ValueError) as error:
            raise BackendUnavailable(f"The model {spec.name} cannot be loaded: {error}") from error
        on_gpu = self._model.model.device == "cuda"
        self.spread = not on_gpu
        self.batch_limit = batch_limit or (_BATCH_ON_GPU if on_gpu else _BATCH_ON_CPU)
        self._first_special = int(self._model.hf_tokenizer.token_to_id("<|endoftext|>"))

    def kind(self, samples: Samples, options: Options) -> Hashable | None:
        """Pieces of one window, by what it is padded to and how wide the search is."""
        frames = len(samples) // _SAMPLES_PER_FRAME
        if frames > self._model.feature_extractor.nb_max_frames:
            return None
        return window(frames, self._shortest), _beam(options), options.words

    def transcribe(
        self,
        samples: Samples,
        options: Options,
        heard: Heard,
        cancelled: Callable[[], bool],
        meeting: Meeting | None = None,
    ) -> Recognised:
        """See `Engine.transcribe`."""
        self._place.meeting, self._place.before_window = meeting, cancelled
        try:
            return self._transcribe(samples, options, heard, cancelled)
        finally:
            self._place.meeting = self._place.before_window = None

    def _transcribe(
        self, samples: Samples, options: Options, heard: Heard, cancelled: Callable[[], bool]
    ) -> Recognised:
        self.spec.check(options)
        if options.language is not None and options.language not in self._model.supported_languages:
            raise UnsupportedOption(f"The model {self.spec.name} does not know this language.", param="language")
        pieces, info = self._model.transcribe(samples.astype(np.float32) / _FULL_SCALE, **self._settings(options))
        texts: list[str] = []
        # The generator is lazy: this loop is where the recognition happens.
        for piece in pieces:
            if cancelled():
                break
            segment = self._segment(piece, to_ms(len(samples)))
            if options.urgency == "batch" and not _believed(segment, samples):
                continue
            texts.append(piece.text)
            heard(segment)
        return Recognised(text="".join(texts).strip(), language=str(info.language))

    def close(self) -> None:
        """Frees the weights; whatever still runs ends first."""
        self._model.model.unload_model()

    def _settings(self, options: Options) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "language": options.language,
            "task": options.task,
            "beam_size": _beam(options),
            "condition_on_previous_text": self.spec.condition_on_previous_text,
            "word_timestamps": options.words,
        }
        if options.temperature is not None:
            settings["temperature"] = options.temperature
        if before := self._before(options):
            settings["initial_prompt"] = before
        if options.hotwords:
            settings["hotwords"] = self._hint(" ".join(options.hotwords))
        return settings

    def _before(self, options: Options) -> str:
        """What the model is to take for the text before: the prompt, then the context, for the nearest counts most."""
        prompt = self._hint(options.prompt or "", last=True)
        if not options.context or not self.spec.condition_on_previous_text:
            return prompt
        room = _BEFORE_TOKENS - _HINT_TOKENS * (bool(prompt) + bool(options.hotwords))
        return f"{prompt} {self._hint(options.context, room, last=True)}".strip()

    def _hint(self, text: str, most: int = _HINT_TOKENS, *, last: bool = False) -> str:
        """What fits of a hint: prompt, hotwords and text share the model's 448 positions. Of a prompt its end counts
        most."""
        tokens = self._model.hf_tokenizer.encode(text, add_special_tokens=False).ids
        if len(tokens) <= most:
            return text
        kept = tokens[-most:] if last else tokens[:most]
        return str(self._model.hf_tokenizer.decode(kept))

    def _segment(self, piece: Any, end_ms: int) -> Segment:
        """Times are guessed in windows, which may end after the recording does."""

        def ms(seconds: float) -> int:
            return min(round(seconds * 1000), end_ms)

        return Segment(
            start_ms=ms(piece.start),
            end_ms=ms(piece.end),
            text=piece.text.strip(),
            words=tuple(
                Word(word.word.strip(), ms(word.start), ms(word.end), float(word.probability))
                for word in piece.words or ()
                if word.word.strip()
            ),
            tokens=tuple(token for token in piece.tokens if token < self._first_special),
            temperature=float(piece.temperature),
            avg_logprob=float(piece.avg_logprob),
            compression_ratio=float(piece.compression_ratio),
            no_speech_prob=float(piece.no_speech_prob),
        )


def _believed(segment: Segment, samples: Samples) -> bool:
    """Whether a recording's segment may leave: it is no loop and, if it is doubtful, has a voice in it. A stream's
    utterances have been through a VAD, and are judged where they are told."""
    return credible(segment) and (not doubtful(segment) or _voiced(samples, segment))


def _voiced(samples: Samples, segment: Segment) -> bool:
    """Whether faster-whisper's VAD hears a voice in the segment, longer than it may err where a sound sets in."""
    from faster_whisper.vad import get_vad_model

    more_ms = max(0, _SHORTEST_MS - (segment.end_ms - segment.start_ms)) // 2
    start, end = max(0, segment.start_ms - more_ms), segment.end_ms + more_ms
    heard = samples[start * SAMPLES_PER_MS : end * SAMPLES_PER_MS].astype(np.float32) / _FULL_SCALE
    padded = np.pad(heard, (0, -len(heard) % _VAD_FRAME))
    return len(padded) > 0 and int((get_vad_model()(padded) > _VOICE).sum()) >= _VOICED_FRAMES


def _beam(options: Options) -> int:
    return 1 if options.urgency == "partial" else _BEAM


def window(content: int, shortest: int) -> int:
    """Frames to encode for so many frames of content. At least half stays padding: without it the micro model's word
    error on windows full of speech rises from 0.9 to 7.7 %. In steps, for CTranslate2 keeps what it has prepared for
    each length it has met (about 2 MiB of the micro model's)."""
    return min(STOCK_WINDOW, max(shortest, -(-2 * content // _STEP) * _STEP))


def _load(
    folder: Path,
    *,
    device: str,
    compute_type: str,
    workers: int,
    threads_per_worker: int,
    shortest_window: int,
    place: Place,
) -> WhisperModel:
    import ctranslate2
    from faster_whisper import WhisperModel

    keep_memory()

    class ShortWindowModel(WhisperModel):  # type: ignore[misc]
        """Cuts the padding of a window before the encoder sees it. `pad_or_trim` fills with zeros, which in the log mel
        scale is no silence, so zeros mark the padding exactly."""

        def detect_language(self, *, features: NDArray[np.float32], **options: Any) -> Any:
            place.detecting = True
            try:
                # The decoding leaves out the last frame; without it, both see the same window.
                return super().detect_language(features=features[..., : max(1, features.shape[-1] - 1)], **options)
            finally:
                place.detecting = False

        def encode(self, features: NDArray[np.float32]) -> Encoded:
            filled = np.flatnonzero(features.any(axis=0))
            content = int(filled[-1]) + 1 if filled.size else 0
            features = features[:, : window(content, shortest_window)]
            if place.before_window is not None:
                place.before_window()  # silent windows give no segment, but others may go first here, too
            known, place.window = place.window, None
            if known is not None and np.array_equal(known[0], features):
                return known[1]
            encoded: Encoded = self.model.encode_window(features, super().encode)
            if place.detecting:
                place.window = features, encoded
            return encoded

    on_gpu = device == "cuda" or (device == "auto" and ctranslate2.get_cuda_device_count() > 0)
    if compute_type == "default":
        compute_type = "float16" if on_gpu else "int8"
    model = ShortWindowModel(
        str(folder),
        device="cuda" if on_gpu else "cpu",
        compute_type=compute_type,
        cpu_threads=threads_per_worker,
        num_workers=workers,
        local_files_only=True,
    )
    sot = int(model.hf_tokenizer.token_to_id("<|startoftranscript|>"))
    model.model = TogetherModel(model.model, place, sot)
    return cast("WhisperModel", model)
