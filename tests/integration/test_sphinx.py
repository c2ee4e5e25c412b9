"""The real pocketsphinx, in its processes, on human speech."""

import os
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from dispatchers.engine.sphinx import SphinxEngine, _pieces
from dispatchers.errors import BackendFailed, UnsupportedOption
from dispatchers.interface import Options, Samples, Segment
from dispatchers.wer import word_errors

SPEECH = Path(__file__).parent.parent / "fixtures" / "speech"


def read(path: Path) -> Samples:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


@pytest.fixture(scope="module")
def engine() -> Iterator[SphinxEngine]:
    engine = SphinxEngine(workers=1)
    yield engine
    engine.close()


def hear(engine: SphinxEngine, samples: Samples, options: Options = Options()) -> tuple[str, list[Segment]]:  # noqa: B008
    segments: list[Segment] = []
    return engine.transcribe(samples, options, segments.append, lambda: False).text, segments


def test_human_speech(engine: SphinxEngine) -> None:
    errors = words = 0
    for path in sorted(SPEECH.glob("*.wav")):
        wrong, spoken = word_errors(path.with_suffix(".txt").read_text(), hear(engine, read(path))[0])
        errors, words = errors + wrong, words + spoken
    assert words == 75
    assert errors / words <= 0.45


def test_word_times_and_a_fresh_start_each_time(engine: SphinxEngine) -> None:
    samples = read(SPEECH / "go-forward.wav")
    first = hear(engine, samples, Options(words=True, language="en"))
    assert first[0] == "go forward ten meters"
    words = first[1][0].words
    assert [word.text for word in words] == ["go", "forward", "ten", "meters"]
    assert all(a.end_ms <= b.start_ms for a, b in pairwise(words))
    assert words[-1].end_ms <= len(samples) / 16
    assert all(0 <= word.confidence <= 1 for word in words)
    hear(engine, read(SPEECH / "austen-0880.wav"))
    assert hear(engine, samples, Options(words=True)) == first


@pytest.mark.parametrize("samples", [0, 160, 32_000])
def test_silence_is_no_text(engine: SphinxEngine, samples: int) -> None:
    assert hear(engine, np.zeros(samples, np.int16)) == ("", [])


def test_only_english(engine: SphinxEngine) -> None:
    with pytest.raises(UnsupportedOption):
        hear(engine, np.zeros(160, np.int16), Options(language="de"))
    with pytest.raises(UnsupportedOption):
        hear(engine, np.zeros(160, np.int16), Options(task="translate"))


def test_long_audio_comes_in_pieces_with_times_of_the_whole(engine: SphinxEngine) -> None:
    phrase, quiet = read(SPEECH / "go-forward.wav"), np.zeros(17 * 16_000, np.int16)
    text, segments = hear(engine, np.concatenate([phrase, quiet, phrase]))
    assert text == "go forward ten meters go forward ten meters"
    assert len(segments) == 2
    assert segments[1].start_ms > (len(phrase) + len(quiet)) / 16


def test_pieces_cover_everything_and_cut_at_the_quietest_place() -> None:
    samples = np.full(50 * 16_000, 1000, np.int16)
    samples[18 * 16_000 : 18 * 16_000 + 1600] = 0
    pieces = list(_pieces(samples))
    assert pieces[0] == (0, 18 * 16_000 + 800)
    assert [end for _, end in pieces[:-1]] == [start for start, _ in pieces[1:]]
    assert pieces[-1][1] == len(samples)
    assert all(0 < end - start <= 20 * 16_000 for start, end in pieces)


def test_cancelling_stops_between_pieces(engine: SphinxEngine) -> None:
    phrase, quiet = read(SPEECH / "go-forward.wav"), np.zeros(17 * 16_000, np.int16)
    segments: list[Segment] = []
    engine.transcribe(np.concatenate([phrase, quiet, phrase]), Options(), segments.append, lambda: len(segments) > 0)
    assert len(segments) == 1


def test_a_dead_worker_is_replaced(engine: SphinxEngine) -> None:
    os.kill(engine._all[0].pid, signal.SIGKILL)
    samples = read(SPEECH / "go-forward.wav")
    with pytest.raises(BackendFailed) as failed:
        hear(engine, samples)
    assert failed.value.retryable
    assert hear(engine, samples)[0] == "go forward ten meters"


def test_no_worker_outlives_its_parent() -> None:
    code = (
        "import time\n"
        "from dispatchers.engine.sphinx import SphinxEngine\n"
        "print(SphinxEngine(workers=1)._all[0].pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
