"""The real engine on the shipped micro model."""

import csv
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dispatchers.engine
from dispatchers.engine.meeting import Meeting
from dispatchers.engine.models import MICRO
from dispatchers.engine.whisper import WhisperEngine, threads, window
from dispatchers.errors import UnsupportedOption
from dispatchers.interface import Options, Samples, Segment
from dispatchers.wer import word_errors

SAMPLES = Path(dispatchers.engine.__file__).parent / "micro" / "samples"
EXACT = [f"clip{n:02}" for n in range(1, 13) if n != 11]


def read(name: str) -> Samples:
    with wave.open(str(SAMPLES / f"{name}.wav")) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


def rows(name: str) -> list[dict[str, str]]:
    with (SAMPLES / f"{name}.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


CLIPS = {row["file"].removesuffix(".wav"): row for row in rows("transcripts")}
LONG = " ".join(row["text"] for row in rows("long"))


@pytest.fixture(scope="module")
def engine() -> Iterator[WhisperEngine]:
    engine = WhisperEngine(MICRO, Path(MICRO.source), device="cpu", cores=2)
    yield engine
    engine.close()


def hear(engine: WhisperEngine, samples: Samples, options: Options = Options()) -> tuple[str, str, list[Segment]]:  # noqa: B008
    segments: list[Segment] = []
    result = engine.transcribe(samples, options, segments.append, lambda: False)
    return result.text, result.language, segments


@pytest.mark.parametrize("options", [Options(), Options(words=True, language="en"), Options(urgency="partial")])
def test_clips(engine: WhisperEngine, options: Options) -> None:
    heard = {name: hear(engine, read(name), options)[0] for name in CLIPS}
    assert {name: heard[name] for name in EXACT} == {name: CLIPS[name]["text"] for name in EXACT}
    errors, words = word_errors(CLIPS["clip11"]["text"], heard["clip11"])
    assert errors <= 1, f"{errors} of {words}"


@pytest.mark.parametrize("options", [Options(), Options(words=True)])
def test_a_long_recording(engine: WhisperEngine, options: Options) -> None:
    text, language, segments = hear(engine, read("long"), options)
    errors, words = word_errors(LONG, text)
    assert errors / words <= 0.02
    assert language == "en"
    assert [segment.start_ms for segment in segments] == sorted(segment.start_ms for segment in segments)
    assert segments[-1].end_ms <= 60_000


def test_word_times(engine: WhisperEngine) -> None:
    row = CLIPS["clip09"]
    _, _, segments = hear(engine, read("clip09"), Options(words=True))
    words = [word for segment in segments for word in segment.words]
    assert [word.text for word in words] == row["text"].split()
    assert all(0 <= word.start_ms <= word.end_ms and 0 <= word.confidence <= 1 for word in words)
    assert abs(words[0].start_ms - float(row["speech_start"]) * 1000) < 350
    assert abs(words[-1].end_ms - float(row["speech_end"]) * 1000) < 350


def test_a_segment_is_clean(engine: WhisperEngine) -> None:
    _, _, [segment] = hear(engine, read("clip09"))
    assert segment.text == segment.text.strip() == CLIPS["clip09"]["text"]
    assert segment.words == ()
    assert segment.tokens
    assert max(segment.tokens) < 900
    assert segment.avg_logprob < 0
    assert segment.temperature == 0


@pytest.mark.parametrize("seconds", [0, 0.005, 0.1, 3, 12])
def test_silence_is_no_text(engine: WhisperEngine, seconds: float) -> None:
    assert hear(engine, np.zeros(int(16_000 * seconds), np.int16)) == ("", "en", [])


def test_padding_is_cut_without_changing_the_text(engine: WhisperEngine) -> None:
    padded = WhisperEngine(MICRO, Path(MICRO.source), device="cpu", cores=2, shortest_window=3000)
    for name in EXACT[:4]:
        assert hear(padded, read(name))[0] == hear(engine, read(name))[0]
    padded.close()


@pytest.mark.parametrize(
    ("content", "shortest", "frames"),
    [(0, 1000, 1000), (300, 1000, 1000), (501, 1000, 1250), (1000, 1000, 2000), (2000, 1000, 3000), (10, 3000, 3000)],
)
def test_window(content: int, shortest: int, frames: int) -> None:
    assert window(content, shortest) == frames


def test_threads_go_by_size() -> None:
    assert threads(8, 4_000_000) == (8, 1)
    assert threads(8, 500_000_000) == (2, 4)
    assert threads(2, 500_000_000) == (1, 2)
    assert threads(1, 500_000_000) == (1, 1)


def test_options_reach_the_model(engine: WhisperEngine) -> None:
    options = Options(prompt="hello " * 500, hotwords=("dog", "address") * 300, temperature=0.0, language="de")
    text, language, _ = hear(engine, read("clip05"), options)
    assert language == "de"
    assert text


def test_only_a_model_made_for_it_sees_what_was_said_before(engine: WhisperEngine) -> None:
    before = Options(language="en", context="we need to cancel the address before sunday " * 100)
    alone = Options(language="en")
    assert hear(engine, read("clip05"), before) == hear(engine, read("clip05"), alone)
    spec = replace(MICRO, condition_on_previous_text=True)
    conditioned = WhisperEngine(spec, Path(MICRO.source), device="cpu", cores=1)
    try:
        assert hear(conditioned, read("clip05"), before)[2] != hear(conditioned, read("clip05"), alone)[2]
    finally:
        conditioned.close()


def test_a_language_that_whisper_does_not_know(engine: WhisperEngine) -> None:
    with pytest.raises(UnsupportedOption):
        hear(engine, read("clip05"), Options(language="xx"))


def test_cancelling_stops_between_segments(engine: WhisperEngine) -> None:
    segments: list[Segment] = []
    engine.transcribe(read("long"), Options(), segments.append, lambda: len(segments) >= 2)
    assert len(segments) == 2


def test_it_asks_before_each_window_of_silence(engine: WhisperEngine) -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return False

    engine.transcribe(np.zeros(60 * 16_000, np.int16), Options(language="en"), lambda _: None, cancelled)
    assert len(asked) >= 6


def test_detecting_the_language_costs_no_second_encoding(
    engine: WhisperEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from faster_whisper import WhisperModel

    windows: list[int] = []
    encode = WhisperModel.encode

    def count(self: WhisperModel, features: np.ndarray) -> object:
        windows.append(features.shape[-1])
        return encode(self, features)

    monkeypatch.setattr(WhisperModel, "encode", count)
    assert hear(engine, read("clip09"))[:2] == (CLIPS["clip09"]["text"], "en")
    assert windows == [1000]
    assert hear(engine, read("clip05"), Options(language="en"))[0] == CLIPS["clip05"]["text"]
    assert windows == [1000, 1000]


# --- several at once ----------------------------------------------------------------------------------------------


class Counted:
    """How many windows each call of the model got."""

    def __init__(self, engine: WhisperEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoded: list[int] = []
        self.decoded: list[int] = []
        from faster_whisper import WhisperModel

        encode, model = WhisperModel.encode, engine._model.model._model

        def counting(self_: WhisperModel, features: np.ndarray) -> object:
            self.encoded.append(len(features))
            return encode(self_, features)

        class Decoding:
            def __getattr__(self, name: str) -> object:
                return getattr(model, name)

            def generate(_, encoded: object, prompts: list[list[int]], **settings: object) -> object:
                self.decoded.append(len(prompts))
                return model.generate(encoded, prompts, **settings)

        monkeypatch.setattr(WhisperModel, "encode", counting)
        monkeypatch.setattr(engine._model.model, "_model", Decoding())


def together(engine: WhisperEngine, pieces: list[tuple[Samples, Options]]) -> list[list[Segment]]:
    """The segments of each, all recognised in one meeting."""
    meeting = Meeting(len(pieces))

    def attend(piece: tuple[Samples, Options]) -> list[Segment]:
        segments: list[Segment] = []
        try:
            engine.transcribe(*piece, segments.append, lambda: False, meeting)
        finally:
            meeting.leave()
        return segments

    with ThreadPoolExecutor(len(pieces)) as threads:
        return list(threads.map(attend, pieces, timeout=60))


def alone(engine: WhisperEngine, pieces: list[tuple[Samples, Options]]) -> list[list[Segment]]:
    return [hear(engine, *piece)[2] for piece in pieces]


def same(found: list[list[Segment]], expected: list[list[Segment]]) -> None:
    """Texts, times and tokens are equal; figures to what float sums leave."""
    assert [[_texts(segment) for segment in piece] for piece in found] == [
        [_texts(segment) for segment in piece] for piece in expected
    ]
    for piece, wanted in zip(found, expected, strict=True):
        figures = [[segment.avg_logprob, segment.no_speech_prob, segment.temperature] for segment in piece]
        assert np.allclose(figures, [[s.avg_logprob, s.no_speech_prob, s.temperature] for s in wanted], atol=1e-4)


def _texts(segment: Segment) -> tuple[object, ...]:
    words = tuple((word.text, word.start_ms, word.end_ms) for word in segment.words)
    return segment.text, segment.start_ms, segment.end_ms, segment.tokens, words


OF_A_KIND = [Options(language="en"), Options(), Options(language="en", words=True), Options(urgency="partial")]


@pytest.mark.parametrize("options", OF_A_KIND)
def test_eight_together_are_as_each_alone(
    engine: WhisperEngine, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [(read(name), options) for name in list(CLIPS)[:8]]
    expected = alone(engine, pieces)
    counted = Counted(engine, monkeypatch)
    same(together(engine, pieces), expected)
    assert counted.encoded == [8]
    assert counted.decoded[0] == 8


def test_windows_of_all_lengths_meet(engine: WhisperEngine) -> None:
    """Every pairing of window lengths, one of them a pair of equals."""
    speech = read("long")
    lengths = [speech[: int(16_000 * seconds)] for seconds in (2, 4.9, 6.2, 7.5, 9.9)]
    assert len({engine.kind(samples, Options()) for samples in lengths}) == 4
    pieces = [(samples, Options(language="en")) for samples in lengths]
    expected = dict(zip(map(len, lengths), alone(engine, pieces), strict=True))
    for one in pieces:
        for other in pieces:
            same(together(engine, [one, other]), [expected[len(one[0])], expected[len(other[0])]])


def test_all_sorts_meet(engine: WhisperEngine) -> None:
    """Different beams, prompts, languages, words, silence, and a recording of many windows beside them."""
    sorts = [
        Options(language="en"),
        Options(urgency="partial"),
        Options(words=True),
        Options(language="en", prompt="the ticket"),
        Options(language="en", hotwords=("ticket", "morning")),
        Options(language="de"),
    ]
    pieces = [(read(name), options) for name, options in zip(CLIPS, sorts, strict=False)]
    pieces += [(np.zeros(32_000, np.int16), Options()), (read("long"), Options(language="en"))]
    same(together(engine, pieces), alone(engine, pieces))


def test_one_that_fails_the_gates_is_redone_alone(engine: WhisperEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A syllable over and over climbs the ladder of temperatures for its repetitions; the others do not."""
    loop = np.tile(read("clip01")[4000:9000], 15)
    pieces = [(read(name), Options(language="en")) for name in EXACT[:3]]
    expected = alone(engine, pieces)
    counted = Counted(engine, monkeypatch)
    found = together(engine, [*pieces, (loop, Options(language="en"))])
    same(found[:3], expected)
    assert counted.decoded[0] == 4
    assert len(counted.decoded) > 1, "the loop passed"
    assert set(counted.decoded[1:]) == {1}


def test_one_that_fails_fails_alone(engine: WhisperEngine) -> None:
    pieces = [(read(name), Options(language="en")) for name in EXACT[:3]]
    meeting, found = Meeting(4), list[object]()

    def attend(piece: tuple[Samples, Options]) -> object:
        try:
            return engine.transcribe(*piece, lambda _: None, lambda: False, meeting).text
        except UnsupportedOption as error:
            return error
        finally:
            meeting.leave()

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(attend, [*pieces, (read("clip05"), Options(language="xx"))], timeout=60))
    assert found[:3] == [CLIPS[name]["text"] for name in EXACT[:3]]
    assert isinstance(found[3], UnsupportedOption)


def test_batches_go_by_the_device(engine: WhisperEngine) -> None:
    assert engine.batch_limit == 1
    assert engine.kind(read("long"), Options()) is None
