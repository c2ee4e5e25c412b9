"""Where a long recording is cut, and how the pieces become one transcript again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dispatchers.interface import SAMPLES_PER_MS, Options, Origin, Samples, Segment, Transcript, to_ms

FRAME_MS = 20
PAUSE_MS = 300  # a cut lies in the middle of the quietest stretch of this length
SEARCH_MS = 30_000
TAIL_MS = 1000  # no chunk is shorter than this, unless the recording is


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a recording, in ms."""

    number: int
    start_ms: int
    end_ms: int

    def of(self, samples: Samples) -> Samples:
        """Its samples; the recording's last fraction of a ms belongs to no chunk."""
        return samples[self.start_ms * SAMPLES_PER_MS : self.end_ms * SAMPLES_PER_MS]


@dataclass(frozen=True, slots=True)
class Heard:
    """A recognised chunk. Times of its segments are the recording's."""

    chunk: Chunk
    language: str
    segments: tuple[Segment, ...]
    origin: Origin


def plan(samples: Samples, chunk_ms: int, *, number: int = 0, start_ms: int = 0) -> Iterator[Chunk]:
    """The chunks from `start_ms` on, none longer than `chunk_ms`, cut where the recording is quietest shortly before.

    A pure function, so that whoever takes over plans the same; it reads the samples only around the cuts, so that a
    mapped file stays on disk.
    """
    length_ms = to_ms(len(samples))
    while length_ms - start_ms > chunk_ms:
        end_ms = _quietest_ms(samples, start_ms, min(start_ms + chunk_ms, length_ms - TAIL_MS))
        yield Chunk(number, start_ms, end_ms)
        number, start_ms = number + 1, end_ms
    if start_ms < length_ms:
        yield Chunk(number, start_ms, length_ms)


def shifted(segment: Segment, by_ms: int) -> Segment:
    """The segment so much later."""
    words = tuple(replace(word, start_ms=word.start_ms + by_ms, end_ms=word.end_ms + by_ms) for word in segment.words)
    return replace(segment, start_ms=segment.start_ms + by_ms, end_ms=segment.end_ms + by_ms, words=words)


def joined(pieces: Sequence[Heard], options: Options) -> Transcript:
    """The transcript of the whole. Its language is that of most of the speech, its origin the first piece's."""
    spoken_ms: Counter[str] = Counter()
    for piece in pieces:
        spoken_ms[piece.language] += sum(segment.end_ms - segment.start_ms for segment in piece.segments)
    segments = tuple(segment for piece in pieces for segment in piece.segments)
    return Transcript(
        text=" ".join(segment.text for segment in segments if segment.text),
        language=spoken_ms.most_common(1)[0][0],
        duration_ms=pieces[-1].chunk.end_ms,
        segments=segments,
        origin=pieces[0].origin,
        task=options.task,
    )


def _quietest_ms(samples: Samples, start_ms: int, limit_ms: int) -> int:
    """The middle of the quietest stretch in the last quarter before the limit (at most 30 s); the latest of equals."""
    from_ms = limit_ms - min(SEARCH_MS, (limit_ms - start_ms) // 4)
    window = samples[from_ms * SAMPLES_PER_MS : limit_ms * SAMPLES_PER_MS]
    frame = FRAME_MS * SAMPLES_PER_MS
    frames = window[: len(window) // frame * frame].reshape(-1, frame)
    energy = np.square(frames, dtype=np.float32).mean(axis=1, dtype=np.float64)
    width = PAUSE_MS // FRAME_MS
    loudness = np.convolve(energy, np.ones(width), mode="valid")
    quietest = len(loudness) - 1 - int(np.argmin(loudness[::-1]))
    return from_ms + quietest * FRAME_MS + PAUSE_MS // 2
