"""The engine in a child process, killed, crashed and left alone: what is lost, what comes back, what stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.decode import load
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.child import EngineChild
from dispatchers.engine.models import MICRO_SAMPLES
from dispatchers.errors import BackendUnavailable, EngineLost, UnknownModel
from dispatchers.interface import Event, Final, Flush, Gap, Options, Pcm, SpeechStarted, StreamError, StreamInput
from dispatchers.local import engine_child
from runtime import telemetry
from runtime.settings import Settings, engine_environment

CLIP = load(MICRO_SAMPLES / "clip09.wav")
SAID = "she will print the ticket in the morning"
LIVE = Options(model="micro", language="en", urgency="final")
BATCH = replace(LIVE, urgency="batch")
SETTINGS = Settings(model="micro", engine_workers=1, log_level="warning")


@pytest.fixture
async def child() -> AsyncIterator[EngineChild]:
    made = engine_child(SETTINGS)
    await made.start()
    yield made
    await made.aclose()


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not met():  # noqa: ASYNC110 — another process' doing
            await asyncio.sleep(0.01)


async def caught(child: EngineChild, options: Options) -> tuple[asyncio.Task[object], int]:
    """A request that has reached the engine, which is held still, and the engine's process."""
    os.kill(child.pid, signal.SIGSTOP)
    asked = asyncio.create_task(child.transcribe(CLIP, options))
    await asyncio.sleep(0.1)
    return asked, child.pid


async def test_batch_work_of_a_killed_engine_is_done_by_the_next(child: EngineChild) -> None:
    before = telemetry.ENGINE_RESTARTS._value.get()
    asked, pid = await caught(child, BATCH)
    os.kill(pid, signal.SIGKILL)
    assert (await asked).text == SAID
    assert child.pid != pid
    assert child.up
    assert telemetry.ENGINE_RESTARTS._value.get() == before + 1


async def test_live_work_of_a_killed_engine_fails_at_once(child: EngineChild) -> None:
    asked, pid = await caught(child, LIVE)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineLost) as lost:
        await asked
    assert lost.value.retryable
    await until(lambda: not child.up)
    assert child.wait_s > 0
    assert child.catalogue()[0].status == "loading"
    assert child.origin("").model == "micro"
    with pytest.raises(BackendUnavailable):
        await child.transcribe(CLIP, replace(LIVE, urgency="partial"))
    assert (await child.transcribe(CLIP, LIVE)).text == SAID  # it waits
    assert child.catalogue()[0].status == "ready"


async def test_patience_ends(child: EngineChild) -> None:
    child._patience_s = 0.0
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: not child.up)
    for options in (LIVE, BATCH):
        with pytest.raises(BackendUnavailable) as refused:
            await child.transcribe(CLIP, options)
        assert refused.value.retry_after_s is not None
    await until(lambda: child.up)
    assert (await child.transcribe(CLIP, LIVE)).text == SAID


async def test_it_is_started_again_and_again_and_each_time_later(child: EngineChild) -> None:
    pids = {child.pid}
    for _ in range(3):
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: not child.up)
        await until(lambda: child.up)
        pids.add(child.pid)
    assert len(pids) == 4
    assert not any(psutil.pid_exists(pid) for pid in pids - {child.pid})


async def test_signals_for_the_parent_do_not_end_it(child: EngineChild) -> None:
    for sign in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, sign)
    assert (await child.transcribe(CLIP, LIVE)).text == SAID
    assert os.getsid(child.pid) == child.pid


async def test_it_leaves_nothing_behind() -> None:
    child = engine_child(SETTINGS)
    await child.start()
    pid, folder = child.pid, child._folder
    assert folder.stat().st_mode & 0o777 == 0o700
    await child.aclose()
    assert not psutil.pid_exists(pid)
    assert not folder.exists()
    assert telemetry.ENGINE_FIGURES._told is None


async def test_a_stopped_one_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatchers.engine.wire.END_S", 0.2)
    child = engine_child(SETTINGS)
    await child.start()
    pid = child.pid
    os.kill(pid, signal.SIGSTOP)
    await child.aclose()
    assert not psutil.pid_exists(pid)


async def test_a_model_that_is_none_is_told_as_itself(tmp_path: Path) -> None:
    child = engine_child(Settings(model=str(tmp_path / "none"), log_level="warning"))
    with pytest.raises(UnknownModel, match="There is no model"):
        await child.start()
    await child.aclose()


async def test_a_program_that_is_no_engine() -> None:
    child = EngineChild([sys.executable, "-c", "import sys; sys.exit(3)"], {})
    with pytest.raises(BackendUnavailable, match="ended with status 3"):
        await child.start()
    await child.aclose()


async def test_its_figures_stand_among_ours(child: EngineChild) -> None:
    await child.transcribe(CLIP, LIVE)
    await child.tell_figures()
    text = telemetry.exposition()[0].decode()
    assert 'stenogate_recognition_seconds_count{model="micro"} 1.0' in text
    assert text.count("# TYPE stenogate_queue_depth gauge") == 1
    assert "stenogate_engine_up 1.0" in text


def test_its_environment_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STENOGATE_DATABASE_URL", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(name, "hush-hush")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    settings = Settings(
        database_url="postgresql://u:hush-hush@h/d",
        signing_key="hush-hush" * 8,
        engine_token="hush-hush",
        model="micro",
    )
    found = engine_environment(settings)
    assert not any("hush" in value for value in found.values())
    assert (found["STENOGATE_MODEL"], found["CUDA_VISIBLE_DEVICES"]) == ("micro", "1")
    assert "STENOGATE_SHORTEST_WINDOW" not in found


# --- who is left when the parent is gone --------------------------------------------------------------------------

PARENT = """
import asyncio, os, sys
from dispatchers.local import engine_child
from runtime.settings import Settings
async def main():
    child = engine_child(Settings(model="micro", log_level="warning"))
    await child.start()
    print(child.pid, child._folder, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_a_killed_parent_leaves_nobody() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    assert parent.stdout is not None
    pid, folder = (await asyncio.to_thread(parent.stdout.readline)).split()
    assert psutil.pid_exists(int(pid))
    parent.kill()
    parent.communicate()
    await until(lambda: not psutil.pid_exists(int(pid)))
    await until(lambda: not Path(folder).exists())


# --- streams ------------------------------------------------------------------------------------------------------


async def test_a_stream_outlives_its_engine(child: EngineChild) -> None:
    """Killed in the middle of an utterance: the client is told, and its text comes late. Killed while the final is made
    of audio that no early one heard: a gap. Then all is as before."""
    speech = np.concatenate([CLIP, np.zeros(16_000, np.int16)])
    half = len(CLIP) // 2
    heard: list[Event] = []

    def count(kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in heard)

    async def said() -> AsyncIterator[StreamInput]:
        yield Pcm(speech[:half])
        await until(lambda: count(SpeechStarted) == 1)
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: not child.up)
        yield Pcm(speech[half:])
        await until(lambda: count(Final) == 1)
        os.kill(child.pid, signal.SIGSTOP)
        yield Pcm(CLIP[:half])
        yield Flush()
        await asyncio.sleep(0.1)
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: count(Gap) == 1)
        yield Pcm(speech)

    async with Segmenting(child, SileroVad.load(), away=lambda: not child.up).stream(said(), LIVE) as events:
        async for event in events:
            heard.append(event)  # noqa: PERF401 — it is looked at meanwhile
    first, *_, last = (event for event in heard if isinstance(event, Final) and event.text)
    assert (first.text, last.text) == (SAID, SAID)
    errors = [event for event in heard if isinstance(event, StreamError)]
    assert errors[0].code == errors[-1].code == "BACKEND_UNAVAILABLE"
    assert all(error.retryable and not error.fatal for error in errors)
    assert heard.index(errors[0]) < heard.index(first)
    (gap,) = (event for event in heard if isinstance(event, Gap))
    assert gap.reason == "BACKEND_UNAVAILABLE"
    assert isinstance(heard[heard.index(gap) - 1], StreamError)
