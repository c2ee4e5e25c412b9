"""A pool of engines over real sockets: engines that die, hang, lie, dawdle, come late and leave."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.decode import load
from dispatchers.audio.vad import SileroVad
from dispatchers.backends import fleet, member
from dispatchers.backends.local import LocalBackend
from dispatchers.backends.outlier import ENOUGH, FAILURES
from dispatchers.backends.pool import EnginePool
from dispatchers.engine import wire
from dispatchers.engine.models import KNOWN, MICRO, MICRO_SAMPLES
from dispatchers.engine.server import EngineServer
from dispatchers.errors import BackendError, BackendFailed, BackendUnavailable, Overloaded, Superseded, UnknownModel
from dispatchers.interface import Event, Final, Gap, Options, Pcm, Segment, StreamInput
from runtime import telemetry
from tests.engines import TOKEN, RunningEngine, engine_process, listening, silent, until
from tests.integration.test_engine_client import Held

MIB = 1024 * 1024
CLIP = load(MICRO_SAMPLES / "clip09.wav")
SAID = "she will print the ticket in the morning"
FINAL = Options(model="micro", language="en", urgency="final", stream="s")
BATCH = replace(FINAL, urgency="batch")
PARTIAL = replace(FINAL, urgency="partial")


@asynccontextmanager
async def pool_of(*urls: str, token: str | None = TOKEN, **options: Any) -> AsyncIterator[EnginePool]:
    pool = EnginePool(urls, token=token, **options)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.aclose()


def micro() -> LocalBackend:
    return LocalBackend(MICRO, workers=1, device="cpu")


@asynccontextmanager
async def engine(
    backend: LocalBackend | None = None, *, host: str = "127.0.0.1", port: int = 0, around: Any = None
) -> AsyncIterator[str]:
    """A real engine in this event loop; `around` wraps its application."""
    server = EngineServer(lambda: backend or micro(), token=TOKEN, max_upload_bytes=64 * MIB)
    app: ASGIApp = server.app()
    await server.load()
    async with listening(around(app) if around else app, host, port) as url:
        yield url
    await server.aclose()


class Delayed:
    """An engine whose answers come late."""

    def __init__(self, app: ASGIApp, by_s: float = 1.2) -> None:
        self.app = app
        self.by_s = by_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == wire.RECOGNISE:
            await asyncio.sleep(self.by_s)
        await self.app(scope, receive, send)


class Instead:
    """An engine that says it is well, and answers what it is asked like this."""

    def __init__(self, answer: Response) -> None:
        self.asked = 0
        self._answer = answer

    def __call__(self, app: ASGIApp) -> ASGIApp:
        async def recognise(request: Request) -> Response:
            await request.body()
            self.asked += 1
            return self._answer

        return Starlette(routes=[Route(wire.RECOGNISE, recognise, methods=["POST"]), Route("/{path:path}", app)])


def labels(pool: EnginePool, *, ready: bool = True) -> list[str]:
    return [member.label for member in pool.members if member.ready is ready]


@pytest.fixture(scope="module")
async def well() -> AsyncIterator[str]:
    async with engine() as url:
        yield url


# --- engines that die ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def held_first(first: RunningEngine, url: str) -> AsyncIterator[EnginePool]:
    """A pool whose first engine, to which work goes while both are idle, is held still."""
    async with pool_of(first.url, url) as pool:
        await until(lambda: len(labels(pool)) == 2)
        first.process.send_signal(signal.SIGSTOP)
        yield pool


@pytest.mark.parametrize("options", [FINAL, BATCH], ids=["final", "batch"])
async def test_what_an_engine_took_with_it_is_done_by_another(well: str, options: Options) -> None:
    before = telemetry.ENGINE_RETRIES.labels("BACKEND_UNAVAILABLE")._value.get()
    with engine_process() as first:
        async with held_first(first, well) as pool:
            asked = [asyncio.create_task(pool.transcribe(CLIP, options)) for _ in range(4)]
            await until(lambda: pool.members[0].in_flight > 0)
            await asyncio.sleep(0.1)
            taken = pool.members[0].in_flight
            first.process.kill()
            assert {(await each).text for each in asked} == {SAID}
            assert not pool.members[0].ready
            assert pool.up
            assert telemetry.ENGINE_RETRIES.labels("BACKEND_UNAVAILABLE")._value.get() == before + taken
            assert (await pool.transcribe(CLIP, options)).text == SAID


async def test_a_partial_of_a_dead_engine_is_not_done_again(well: str) -> None:
    with engine_process() as first:
        async with held_first(first, well) as pool:
            asked = asyncio.create_task(pool.transcribe(CLIP, PARTIAL))
            await until(lambda: pool.members[0].in_flight == 1)
            first.process.kill()
            with pytest.raises(BackendFailed):  # no outage that a stream should hear of
                await asked
            assert (await pool.transcribe(CLIP, PARTIAL)).text == SAID


async def test_an_engine_killed_in_mid_utterance_costs_no_utterance(well: str) -> None:
    """Two streams, one engine killed while each is in its second utterance: every final comes, and no gap."""
    long = load(MICRO_SAMPLES / "long.wav")[: 12 * 16_000]

    async def live() -> AsyncIterator[StreamInput]:
        for at in range(0, len(long), 1_600):
            yield Pcm(long[at : at + 1_600])
            await asyncio.sleep(0.02)

    async def heard(dispatcher: Segmenting) -> list[Event]:
        async with dispatcher.stream(live(), replace(FINAL, urgency="batch")) as events:
            return [event async for event in events]

    with engine_process() as first:
        async with pool_of(well) as alone:
            expected = [
                event.text for event in await heard(Segmenting(alone, SileroVad.load())) if isinstance(event, Final)
            ]
        async with pool_of(first.url, well) as pool:
            await until(lambda: len(labels(pool)) == 2)
            vad = SileroVad.load()
            talks = [asyncio.create_task(heard(Segmenting(pool, vad, away=lambda: not pool.up))) for _ in range(2)]
            await asyncio.sleep(1.0)
            first.process.kill()
            told = await asyncio.gather(*talks)
            vad.close()
    for events in told:
        assert [event.text for event in events if isinstance(event, Final)] == expected
        assert not [event for event in events if isinstance(event, Gap)]
    assert len(expected) >= 3


async def test_an_engine_that_is_asked_to_end_finishes_what_it_has(well: str) -> None:
    before = telemetry.ENGINE_RETRIES.labels("BACKEND_UNAVAILABLE")._value.get()
    with engine_process() as first:
        async with pool_of(first.url, well) as pool:
            await until(lambda: len(labels(pool)) == 2)
            asked = [asyncio.create_task(pool.transcribe(CLIP, FINAL)) for _ in range(8)]
            await until(lambda: pool.members[0].in_flight > 0)
            await asyncio.sleep(0.05)
            first.process.send_signal(signal.SIGTERM)
            assert {(await each).text for each in asked} == {SAID}
            await until(lambda: not pool.members[0].ready)
            assert await asyncio.to_thread(first.process.wait, 30) in (0, -signal.SIGTERM)
            assert (await pool.transcribe(CLIP, FINAL)).text == SAID
    assert telemetry.ENGINE_RETRIES.labels("BACKEND_UNAVAILABLE")._value.get() == before


async def test_an_engine_that_hangs_is_given_up_with_what_it_has(well: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "PROBE_S", 0.5)
    with engine_process() as first:
        async with held_first(first, well) as pool:
            asked = asyncio.create_task(pool.transcribe(CLIP, FINAL))
            await until(lambda: pool.members[0].in_flight == 1)
            assert (await asked).text == SAID
            assert pool.members[0].trouble == "does not answer"
            first.process.send_signal(signal.SIGCONT)
            await until(lambda: pool.members[0].ready)


async def test_the_only_engine_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_process() as only:
        async with pool_of(only.url) as pool:
            port = int(only.url.rpartition(":")[2])
            only.process.kill()
            only.process.wait()
            await until(lambda: not pool.up)
            with pytest.raises(BackendUnavailable, match="No engine is ready") as refused:
                await pool.transcribe(CLIP, PARTIAL)
            assert refused.value.retry_after_s
            assert pool.catalogue()[0].status == "loading"
            assert not pool.capabilities.up
            waiting = asyncio.create_task(pool.transcribe(CLIP, FINAL))
            again = engine_process(port=port)
            await asyncio.to_thread(again.__enter__)
            try:
                assert (await waiting).text == SAID
            finally:
                again.__exit__(None, None, None)


async def test_patience_ends() -> None:
    async with silent() as url, pool_of(url, patience_s=0.2) as pool:
        for options in (FINAL, BATCH, PARTIAL):
            with pytest.raises(BackendUnavailable):
                await pool.transcribe(CLIP, options)


# --- engines that lie, dawdle or say nothing ----------------------------------------------------------------------


async def test_a_silent_engine_gets_nothing(well: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "PROBE_S", 0.3)
    async with silent() as url, pool_of(url, well) as pool:
        assert pool.members[0].trouble == "does not answer"
        assert (await pool.transcribe(CLIP, FINAL)).text == SAID
        assert pool.members[0].in_flight == 0


@pytest.mark.parametrize(
    "answer",
    [
        Response("what nobody should read", 500),
        HTMLResponse("<html>what nobody should read</html>"),
        PlainTextResponse(b"\x00\xff" * 1000 + b"\n"),
        PlainTextResponse('{"transcript": {"text": 5}}\n'),
        PlainTextResponse('{"segment": {"start_ms": 0, "end_ms": 1, "text": "one"}}\n'),
        PlainTextResponse(""),
        Response(status_code=302, headers={"location": "http://elsewhere.invalid/"}),
        Response(status_code=404),
        Response(status_code=401),
        Response("busy", 503),
    ],
    ids=["500", "html", "binary", "wrong types", "half", "nothing", "redirect", "404", "401", "503"],
)
async def test_answers_that_are_none_are_sought_elsewhere(well: str, answer: Response) -> None:
    liar = Instead(answer)
    async with engine(around=liar) as url, pool_of(url, well) as pool:
        for _ in range(FAILURES + 2):
            assert (await pool.transcribe(CLIP, FINAL)).text == SAID
        assert 1 <= liar.asked <= FAILURES + 2


async def test_an_engine_that_fails_again_and_again_is_let_out(well: str) -> None:
    liar = Instead(Response(status_code=500))
    before = telemetry.ENGINE_EJECTIONS.labels("failing")._value.get()
    async with engine(around=liar) as url, pool_of(url, well) as pool:
        for _ in range(FAILURES + 5):
            assert (await pool.transcribe(CLIP, FINAL)).text == SAID
        assert liar.asked == FAILURES
        assert pool.members[0].record.out
        assert telemetry.ENGINE_EJECTIONS.labels("failing")._value.get() == before + 1
        assert telemetry.ENGINES.labels("ejected")._value.get() == 1
        figures = telemetry.ENGINE_IN_FLIGHT.labels(pool.members[1].label)._value.get()
        assert figures == 0


async def test_where_all_fail_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    liars = [Instead(Response(status_code=500)) for _ in range(2)]
    async with engine(around=liars[0]) as one, engine(around=liars[1]) as other, pool_of(one, other) as pool:
        with pytest.raises(BackendError):
            await pool.transcribe(CLIP, FINAL)
        assert sorted(liar.asked for liar in liars) == [1, 2]


async def test_a_slow_engine_is_let_out(well: str) -> None:
    async with engine(around=Delayed) as slow, pool_of(slow, well) as pool:
        while not pool.members[0].record.out:
            answers = await asyncio.gather(*(pool.transcribe(CLIP, FINAL) for _ in range(4)))
            assert {answer.text for answer in answers} == {SAID}
        assert pool.members[0].record.reason == "slow"
        quick = pool.members[1].record.finals
        assert quick >= ENOUGH
        await pool.transcribe(CLIP, FINAL)
        assert pool.members[1].record.finals == quick + 1


async def test_a_wrong_token_is_said() -> None:
    async with engine() as url:
        async with pool_of(url, token="another", patience_s=0.1) as pool:
            assert "STENOGATE_ENGINE_TOKEN" in pool.members[0].trouble
            assert "another" not in pool.members[0].trouble
            assert not pool.up
            with pytest.raises(BackendUnavailable):
                await pool.transcribe(CLIP, FINAL)
        async with pool_of(url) as pool:
            assert (await pool.transcribe(CLIP, FINAL)).text == SAID


# --- which engines there are --------------------------------------------------------------------------------------


async def test_each_address_of_a_name_is_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "LOOKUP_S", 0.05)
    found: list[str] = ["127.0.0.1", "127.0.0.2"]
    asked: list[tuple[str, int]] = []

    async def look_up(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        if not found:
            raise OSError
        return list(found)

    hosts: set[str] = set()

    def noting(app: ASGIApp) -> ASGIApp:
        async def noted(scope: Scope, receive: Receive, send: Send) -> None:
            hosts.add(dict(scope["headers"])[b"host"].decode())
            await app(scope, receive, send)

        return noted

    async with engine(around=noting) as first:
        port = int(first.rpartition(":")[2])
        async with (
            engine(host="127.0.0.2", port=port, around=noting),
            pool_of(f"http://engines.internal:{port}", look_up=look_up) as pool,
        ):
            assert labels(pool) == [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]
            assert asked[0] == ("engines.internal", port)
            answers = await asyncio.gather(*(pool.transcribe(CLIP, FINAL) for _ in range(6)))
            assert {answer.text for answer in answers} == {SAID}
            assert all(each.record.finals for each in pool.members)
            assert hosts == {f"engines.internal:{port}"}

            found.clear()  # a resolver that fails changes nothing
            await asyncio.sleep(0.2)
            assert len(pool.members) == 2
            found.append("127.0.0.2")
            await until(lambda: labels(pool) == [f"127.0.0.2:{port}"])
            assert (await pool.transcribe(CLIP, FINAL)).text == SAID
            found.append("127.0.0.1")
            await until(lambda: len(labels(pool)) == 2)


async def test_an_engine_that_leaves_finishes_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "LOOKUP_S", 0.05)
    found = ["127.0.0.1"]

    async def look_up(host: str, port: int) -> Sequence[str]:
        return list(found)

    async with engine(around=lambda app: Delayed(app, 0.5)) as url:
        port = int(url.rpartition(":")[2])
        async with pool_of(f"http://engines.internal:{port}", look_up=look_up) as pool:
            asked = asyncio.create_task(pool.transcribe(CLIP, FINAL))
            leaving = pool.members[0]
            await until(lambda: leaving.in_flight == 1)
            found[:] = ["127.0.0.3"]
            await until(lambda: leaving.leaving)
            assert (await asked).text == SAID
            await until(lambda: leaving.client._http.is_closed)


async def test_a_model_on_one_engine_only(well: str) -> None:
    more = LocalBackend(KNOWN["pocketsphinx"], workers=1)
    async with engine(more) as other, pool_of(well, other) as pool:
        cards = {card.name: card for card in pool.catalogue()}
        assert [card.name for card in pool.catalogue() if card.default] == ["micro"]
        assert pool.catalogue()[0].name == "micro"
        assert cards["micro"].status == "ready"
        assert cards["pocketsphinx"].status == "ready"  # on the one that has it loaded
        assert pool.capabilities.models[0] == "micro"
        for _ in range(3):
            answer = await pool.transcribe(CLIP, replace(FINAL, model="pocketsphinx"))
            assert answer.origin == pool.origin("pocketsphinx")
        assert pool.members[1].record.finals == 3
        assert (await pool.transcribe(CLIP, replace(FINAL, model=""))).origin.model == "micro"
        with pytest.raises(UnknownModel):
            await pool.transcribe(CLIP, replace(FINAL, model="nowhere"))
        assert pool.origin("").model == "micro"


# --- work that is held --------------------------------------------------------------------------------------------


def held_backend(held: Held) -> LocalBackend:
    return LocalBackend(KNOWN["base"], workers=1, load=lambda _: held)


async def test_slots_are_given_back_and_bounded() -> None:
    held = Held()
    async with engine(held_backend(held)) as url, pool_of(url, at_once=2, patience_s=0.3) as pool:
        options = replace(FINAL, model="base")
        running = [asyncio.create_task(pool.transcribe(CLIP, options)) for _ in range(2)]
        await until(held.entered.is_set)
        assert pool.members[0].in_flight == 2
        with pytest.raises(Overloaded):
            await pool.transcribe(CLIP, replace(options, urgency="partial"))
        with pytest.raises(Overloaded):
            await pool.transcribe(CLIP, options)
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert pool.members[0].in_flight == 0
        await until(held.stopped.is_set)  # the engine was told
        held.open.set()
        assert (await pool.transcribe(CLIP, options)).text == "one"


async def test_what_somebody_has_heard_of_is_not_begun_again(well: str) -> None:
    half = PlainTextResponse('{"segment": {"start_ms": 0, "end_ms": 1, "text": "one"}}\n')
    async with engine(around=Instead(half)) as url, pool_of(url, well) as pool:
        told: list[Segment] = []
        with pytest.raises(BackendUnavailable):
            await pool.transcribe(CLIP, BATCH, told.append)
        assert [segment.text for segment in told] == ["one"]
        await until(lambda: len(labels(pool)) == 2)
        assert (await pool.transcribe(CLIP, BATCH)).text == SAID


async def test_the_newest_partial_wins_across_a_pool(well: str) -> None:
    held = Held()
    async with (
        engine(held_backend(held)) as first,
        engine(held_backend(Held())) as second,
        pool_of(first, second) as pool,
    ):
        partial = replace(PARTIAL, model="base")
        running = asyncio.create_task(pool.transcribe(CLIP, replace(partial, stream="another")))
        await until(held.entered.is_set)
        tied = asyncio.create_task(pool.transcribe(CLIP, partial))
        await until(lambda: sum(each.in_flight for each in pool.members) == 2)
        newer = asyncio.create_task(pool.transcribe(CLIP, partial))
        with pytest.raises(Superseded):
            await asyncio.wait_for(newer, 5)
        for each in (running, tied):
            each.cancel()
        await asyncio.gather(running, tied, return_exceptions=True)
        held.open.set()


# --- the whole ----------------------------------------------------------------------------------------------------


async def test_figures_of_all_engines(well: str) -> None:
    async with engine() as other, pool_of(well, other) as pool:
        await pool.transcribe(CLIP, FINAL)
        await pool.tell_figures()
        body = telemetry.exposition()[0].decode()
        for each in pool.members:
            assert f'stenogate_queue_depth{{engine="{each.label}"}}' in body
        assert body.count("# TYPE stenogate_queue_depth gauge") == 1
        assert telemetry.ENGINES.labels("ready")._value.get() == 2
        assert telemetry.ENGINE_UP._value.get() == 1
    assert "stenogate_queue_depth{" not in telemetry.exposition()[0].decode()


async def test_it_leaves_no_task(well: str) -> None:
    before = asyncio.all_tasks()
    async with pool_of(well) as pool:
        await pool.transcribe(CLIP, FINAL)
    assert asyncio.all_tasks() <= before
