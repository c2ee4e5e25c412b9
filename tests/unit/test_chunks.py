"""Cuts lie in pauses, cover everything once, and come out the same for whoever takes over."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatchers.interface import Options, Origin, Samples, Segment, Word
from workers.chunks import TAIL_MS, Chunk, Heard, joined, plan, shifted

ORIGIN = Origin("self_hosted", "scripted", "scripted")


def noise(milliseconds: int) -> Samples:
    return np.random.default_rng(3).integers(-5000, 5000, milliseconds * 16).astype(np.int16)


def test_a_cut_lies_inside_the_pause() -> None:
    samples = noise(60_000)
    samples[16_000 * 17 : 16_000 * 18] //= 100
    first, *_ = plan(samples, 20_000)
    assert 17_000 < first.end_ms < 18_000


def test_a_short_recording_is_one_chunk() -> None:
    assert list(plan(noise(20_000), 20_000)) == [Chunk(0, 0, 20_000)]
    assert list(plan(noise(7), 20_000)) == [Chunk(0, 0, 7)]


@settings(max_examples=25, deadline=None)
@given(milliseconds=st.integers(1, 70_000), chunk_ms=st.integers(10_000, 30_000), silent=st.booleans())
def test_chunks_cover_everything_once(milliseconds: int, chunk_ms: int, silent: bool) -> None:
    samples = np.zeros(milliseconds * 16 + 5, np.int16) if silent else noise(milliseconds)
    chunks = list(plan(samples, chunk_ms))
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.start_ms for chunk in chunks] == [0, *(chunk.end_ms for chunk in chunks[:-1])]
    assert chunks[-1].end_ms == milliseconds
    assert all(0 < chunk.end_ms - chunk.start_ms <= chunk_ms for chunk in chunks)
    assert len(chunks) == 1 or chunks[-1].end_ms - chunks[-1].start_ms >= TAIL_MS
    for done in range(len(chunks)):
        rest = plan(samples, chunk_ms, number=done, start_ms=chunks[done].start_ms)
        assert list(rest) == chunks[done:]


def test_joined_pieces_are_one_transcript() -> None:
    def piece(number: int, language: str, length_ms: int) -> Heard:
        said = Segment(100, length_ms, f"piece {number}", words=(Word("piece", 100, 200, 1.0),))
        chunk = Chunk(number, number * 10_000, (number + 1) * 10_000)
        return Heard(chunk, language, (shifted(said, chunk.start_ms),), ORIGIN)

    silent = Heard(Chunk(2, 20_000, 30_000), "fr", (), ORIGIN)
    transcript = joined([piece(0, "en", 2000), piece(1, "de", 9000), silent], Options(task="translate"))
    assert transcript.text == "piece 0 piece 1"
    assert (transcript.language, transcript.duration_ms, transcript.task) == ("de", 30_000, "translate")
    assert [segment.start_ms for segment in transcript.segments] == [100, 10_100]
    assert transcript.segments[1].words[0].start_ms == 10_100
