"""The local backend on the real micro model, and on an engine of the test's own where work must be held."""

import asyncio
import csv
import threading
import wave
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

import dispatchers.engine
from dispatchers.backends.local import LocalBackend
from dispatchers.engine.interface import Engine, Recognised
from dispatchers.engine.meeting import Meeting
from dispatchers.engine.models import KNOWN, MICRO, POCKETSPHINX, ModelSpec
from dispatchers.engine.wire import ModelCard
from dispatchers.errors import (
    BackendFailed,
    BackendTimeout,
    BackendUnavailable,
    Overloaded,
    Superseded,
    UnknownModel,
    UnsupportedOption,
)
from dispatchers.interface import Heard, Options, Origin, Samples, Segment, StreamInput, Transcript, Urgency
from runtime.telemetry import REGISTRY

SAMPLES = Path(dispatchers.engine.__file__).parent / "micro" / "samples"
SECOND = np.zeros(16_000, np.int16)


def read(name: str) -> Samples:
    with wave.open(str(SAMPLES / f"{name}.wav")) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


@pytest.fixture(scope="module")
async def micro(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalBackend]:
    backend = LocalBackend(MICRO, workers=2, device="cpu", cache_dir=tmp_path_factory.mktemp("models"))
    await backend.warm()
    yield backend
    await backend.aclose()


async def test_it_transcribes_and_says_who_did(micro: LocalBackend) -> None:
    samples, segments = read("clip09"), list[Segment]()
    transcript = await micro.transcribe(samples, Options(words=True), segments.append)
    assert transcript.text == "she will print the ticket in the morning"
    assert transcript.origin == Origin("self_hosted", "faster-whisper", "micro")
    assert transcript.duration_ms == len(samples) // 16
    assert tuple(segments) == transcript.segments
    assert transcript.segments[0].words


async def test_segments_are_heard_in_order_on_the_loop(micro: LocalBackend) -> None:
    loop, starts = threading.get_ident(), list[int]()

    def heard(segment: Segment) -> None:
        assert threading.get_ident() == loop
        starts.append(segment.start_ms)

    transcript = await micro.transcribe(read("long"), Options(), heard)
    assert starts == sorted(starts)
    assert len(starts) == len(transcript.segments) > 5


async def test_many_at_once_are_not_mixed_up(micro: LocalBackend) -> None:
    with (SAMPLES / "transcripts.tsv").open() as file:
        clips = [row for row in csv.DictReader(file, delimiter="\t") if row["file"] != "clip11.wav"]
    found = await asyncio.gather(
        *(micro.transcribe(read(row["file"].removesuffix(".wav")), Options(share=row["file"])) for row in clips)
    )
    assert [transcript.text for transcript in found] == [row["text"] for row in clips]


async def test_a_crowd_in_batches_is_not_mixed_up(tmp_path: Path) -> None:
    """Finals and partials of several shares, with and without words: the texts that each gets alone."""
    with (SAMPLES / "transcripts.tsv").open() as file:
        clips = [row for row in csv.DictReader(file, delimiter="\t") if row["file"] != "clip11.wav"]
    backend = LocalBackend(MICRO, workers=1, device="cpu", cache_dir=tmp_path, batch_limit=8)
    await backend.warm()
    batches, pieces = figure("stenogate_batch_size_count"), figure("stenogate_batch_size_sum")
    asked = [
        (row, Options(share=share, urgency=urgency, words=words, language="en"))
        for row in clips
        for share, urgency, words in (("a", "final", False), ("b", "partial", False), ("b", "batch", True))
    ]
    found = await asyncio.gather(
        *(backend.transcribe(read(row["file"].removesuffix(".wav")), options) for row, options in asked)
    )
    assert [transcript.text for transcript in found] == [row["text"] for row, _ in asked]
    assert figure("stenogate_batch_size_sum") - pieces == len(asked)
    assert figure("stenogate_batch_size_count") - batches <= len(asked) / 4
    await backend.aclose()


def figure(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


async def test_other_models_load_when_they_are_asked_for(micro: LocalBackend) -> None:
    assert micro.catalogue() == (
        ModelCard("micro", "faster-whisper", default=True, status="ready"),
        ModelCard("pocketsphinx", "pocketsphinx", default=False, status="available"),
    )
    assert micro.capabilities.models == ("micro", "pocketsphinx")
    transcript = await micro.transcribe(SECOND, Options(model="pocketsphinx"))
    assert (transcript.text, transcript.origin) == ("", Origin("self_hosted", "pocketsphinx", "pocketsphinx"))
    assert micro.catalogue()[1].status == "ready"


@pytest.mark.parametrize("name", ["nonsense", "small", "../micro", str(SAMPLES.parent / "model"), "a/b"])
async def test_a_model_that_is_not_here(micro: LocalBackend, name: str) -> None:
    with pytest.raises(UnknownModel, match="GET /v1/models"):
        await micro.transcribe(SECOND, Options(model=name))


async def nothing() -> AsyncIterator[StreamInput]:
    return
    yield


async def test_what_a_model_cannot_do(micro: LocalBackend) -> None:
    with pytest.raises(UnsupportedOption):
        await micro.transcribe(SECOND, Options(model="pocketsphinx", language="de"))
    with pytest.raises(UnsupportedOption):
        micro.stream(nothing(), Options())


class Held:
    """An engine that holds every transcription until it is let go, or until it is told to stop."""

    workers = 1
    batch_limit = 1

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.entered, self.open, self.closed, self.stopped = (threading.Event() for _ in range(4))
        self.failure: Exception | None = None

    def kind(self, samples: Samples, options: Options) -> None:
        pass

    def transcribe(
        self,
        samples: Samples,
        options: Options,
        heard: Heard,
        cancelled: Callable[[], bool],
        meeting: Meeting | None = None,
    ) -> Recognised:
        self.entered.set()
        while not self.open.wait(0.01):
            if cancelled():
                self.stopped.set()
                break
        if self.failure:
            raise self.failure
        heard(Segment(0, 1, "x"))
        return Recognised("x", "en")

    def close(self) -> None:
        self.closed.set()


class Shelf:
    """Loads `Held` engines and counts."""

    def __init__(self) -> None:
        self.engines = {spec.name: Held(spec) for spec in (KNOWN["base"], MICRO, POCKETSPHINX)}
        self.loads: list[str] = []
        self.loaded: set[str] = set()
        self.failure: Exception | None = None

    def __call__(self, spec: ModelSpec) -> Engine:
        self.loads.append(spec.name)
        if self.failure:
            raise self.failure
        self.loaded.add(spec.name)
        return self.engines[spec.name]

    def __getitem__(self, name: str) -> Held:
        return self.engines[name]


@pytest.fixture
async def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
async def held(shelf: Shelf, tmp_path: Path) -> AsyncIterator[LocalBackend]:
    backend = LocalBackend(KNOWN["base"], workers=1, cache_dir=tmp_path, queue_limit=1, max_loaded=2, load=shelf)
    yield backend
    for engine in shelf.engines.values():
        engine.open.set()
    await backend.aclose()
    assert {name for name, engine in shelf.engines.items() if engine.closed.is_set()} == shelf.loaded


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 30)


async def test_one_load_for_all_who_ask(held: LocalBackend, shelf: Shelf) -> None:
    await asyncio.gather(held.warm(), held.warm(), held.warm())
    assert shelf.loads == ["base"]


async def test_cancelling_tells_the_engine(held: LocalBackend, shelf: Shelf) -> None:
    await held.warm()
    heard: list[Segment] = []
    task = asyncio.create_task(held.transcribe(SECOND, Options(), heard.append))
    await until(shelf["base"].entered)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(shelf["base"].stopped)
    await asyncio.sleep(0.05)
    assert heard == []


async def test_a_full_queue_refuses(held: LocalBackend, shelf: Shelf) -> None:
    await held.warm()
    first = asyncio.create_task(held.transcribe(SECOND, Options()))
    await until(shelf["base"].entered)
    second = asyncio.create_task(held.transcribe(SECOND, Options()))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await held.transcribe(SECOND, Options())
    assert (held.running, held.waiting, held.workers) == (1, 1, 1)
    shelf["base"].open.set()
    assert [(await task).text for task in (first, second)] == ["x", "x"]


async def test_a_stream_has_one_waiting_partial(held: LocalBackend, shelf: Shelf) -> None:
    await held.warm()
    coalesced, dropped = figure("stenogate_coalesced_partials_total"), figure("stenogate_dropped_partials_total")
    first = asyncio.create_task(held.transcribe(SECOND, Options()))
    await until(shelf["base"].entered)

    def ask(urgency: Urgency) -> asyncio.Task[Transcript]:
        return asyncio.create_task(held.transcribe(SECOND, Options(urgency=urgency, stream="s")))

    old, new, final = ask("partial"), ask("partial"), ask("final")
    for late in (old, new):
        with pytest.raises(Superseded):
            await late
    left = ask("partial")
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.wait([left])
    shelf["base"].open.set()
    assert [(await task).text for task in (first, final)] == ["x", "x"]
    assert figure("stenogate_coalesced_partials_total") - coalesced == 1
    assert figure("stenogate_dropped_partials_total") - dropped == 2


async def test_a_hung_engine_times_out(held: LocalBackend, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatchers.backends.local._PATIENCE_S", 0.05)
    monkeypatch.setattr("dispatchers.backends.local._SLOWEST", 0.0)
    with pytest.raises(BackendTimeout):
        await held.transcribe(SECOND, Options())
    await until(shelf["base"].stopped)


async def test_a_failing_engine_is_a_backend_failure(held: LocalBackend, shelf: Shelf) -> None:
    await held.warm()
    shelf["base"].failure = RuntimeError("of the native kind")
    shelf["base"].open.set()
    with pytest.raises(BackendFailed) as failed:
        await held.transcribe(SECOND, Options())
    assert "native" not in failed.value.message


async def test_a_model_that_cannot_be_loaded_is_tried_again(held: LocalBackend, shelf: Shelf) -> None:
    shelf.failure = OSError("no such file")
    with pytest.raises(BackendUnavailable):
        await held.warm()
    assert held.catalogue()[0].status == "failed"
    shelf.failure = None
    await held.warm()
    assert held.catalogue()[0].status == "ready"


async def test_the_model_idle_longest_makes_room_but_never_the_default(held: LocalBackend, shelf: Shelf) -> None:
    await held.warm()
    task = asyncio.create_task(held.transcribe(SECOND, Options(model="micro")))
    await until(shelf["micro"].entered)
    with pytest.raises(Overloaded):
        await held.transcribe(SECOND, Options(model=POCKETSPHINX.name))
    shelf["micro"].open.set()
    await task
    other = asyncio.create_task(held.transcribe(SECOND, Options(model=POCKETSPHINX.name)))
    await until(shelf["micro"].closed)
    await until(shelf[POCKETSPHINX.name].entered)
    shelf[POCKETSPHINX.name].open.set()
    await other
    assert not shelf["base"].closed.is_set()
    assert [card.status for card in held.catalogue()] == ["ready", "available", "ready"]


async def test_after_closing_nothing_is_taken(held: LocalBackend) -> None:
    await held.aclose()
    with pytest.raises(BackendUnavailable):
        await held.transcribe(SECOND, Options())
