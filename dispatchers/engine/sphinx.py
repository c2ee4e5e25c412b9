"""pocketsphinx: the small offline English recogniser, in worker processes because it holds the GIL while it decodes.

A worker keeps its decoder (half a second to load, 91 MB) and forgets everything between requests. Audio goes to it in
pieces, so memory stays flat however long the recording is. Each piece is decoded as a full utterance: the cepstral
mean then comes from the piece itself (26.7 % word error on the human recordings of the tests, against 38.7 % with a
mean that adapts while it goes).
"""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from dispatchers.engine.interface import Recognised
from dispatchers.engine.meeting import Meeting
from dispatchers.engine.models import POCKETSPHINX, ModelSpec
from dispatchers.errors import BackendFailed, BackendTimeout, BackendUnavailable
from dispatchers.interface import SAMPLE_RATE, Heard, Options, Samples, Segment, Word, to_ms

_PIECE = 20 * SAMPLE_RATE
_SEARCHED = 5 * SAMPLE_RATE
_BLOCK = SAMPLE_RATE // 10
_READY_S = 30.0
_PIECE_S = 120.0
_FRAME_MS = 10
_INAUDIBLE = 100
"""A piece that never leaves ±100 (-50 dB of full scale) is silence; its noise would give words."""


class SphinxEngine:
    """pocketsphinx with its own English model, in `workers` processes.

    Raises `BackendUnavailable` when they cannot be started."""

    batch_limit = 1

    def __init__(self, workers: int, spec: ModelSpec = POCKETSPHINX) -> None:
        self.spec = spec
        self.workers = workers
        started: list[_Worker] = []
        try:
            started.extend(_Worker() for _ in range(workers))
            for worker in started:
                worker.wait_ready()
        except BaseException:
            for worker in started:
                worker.kill()
            raise
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = started
        for worker in started:
            self._idle.put(worker)

    def kind(self, samples: Samples, options: Options) -> None:
        """Nothing goes together here."""

    def transcribe(
        self,
        samples: Samples,
        options: Options,
        heard: Heard,
        cancelled: Callable[[], bool],
        meeting: Meeting | None = None,
    ) -> Recognised:
        """See `Engine.transcribe`. A piece without words gives no segment. Raises `BackendFailed` when the worker
        died; another has taken its place."""
        self.spec.check(options)
        texts: list[str] = []
        with self._worker() as worker:
            for start, end in _pieces(samples):
                if cancelled():
                    break
                piece = samples[start:end]
                words = worker.decode(piece, to_ms(start)) if np.abs(piece.astype(np.int32)).max() > _INAUDIBLE else ()
                if words:
                    text = " ".join(word.text for word in words)
                    texts.append(text)
                    heard(Segment(words[0].start_ms, words[-1].end_ms, text, words if options.words else ()))
        return Recognised(text=" ".join(texts), language="en")

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._all:
            worker.kill()

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        worker = self._idle.get()
        try:
            yield worker
        except (BackendFailed, BackendTimeout):
            worker.restart()
            raise
        finally:
            self._idle.put(worker)


class _Worker:
    """One process with a decoder, seen from here. It ends with the pipe, and so with this process, whatever ends it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "dispatchers.engine.sphinx", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)  # noqa: S603
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        try:
            if self._pipe.poll(_READY_S):
                self._pipe.recv_bytes()
                return
        except (EOFError, OSError):
            pass
        raise BackendUnavailable("pocketsphinx could not be started.")

    def decode(self, samples: Samples, offset_ms: int) -> tuple[Word, ...]:
        try:
            self._pipe.send_bytes(np.ascontiguousarray(samples, dtype="<i2").tobytes())
            if not self._pipe.poll(_PIECE_S):
                raise BackendTimeout
            found: list[tuple[str, int, int, float]] = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise BackendFailed from error
        return tuple(Word(text, offset_ms + start, offset_ms + end, sure) for text, start, end, sure in found)

    def restart(self) -> None:
        """A new process in place of this one; whoever uses it next waits for its decoder."""
        self.kill()
        self._start()
        with suppress(BackendUnavailable):
            self.wait_ready()

    def kill(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()


def _pieces(samples: Samples) -> Iterator[tuple[int, int]]:
    """Cuts of at most 20 s, each at the quietest tenth of a second of its last 5 s."""
    start = 0
    while len(samples) - start > _PIECE:
        first = start + _PIECE - _SEARCHED
        blocks = samples[first : start + _PIECE].astype(np.float32).reshape(-1, _BLOCK)
        end = first + int(np.argmin(np.square(blocks).mean(axis=1))) * _BLOCK + _BLOCK // 2
        yield start, end
        start = end
    if start < len(samples):
        yield start, len(samples)


# --- in the worker process ----------------------------------------------------------------------------------------


def _decode(decoder: Any, pcm: bytes) -> list[tuple[str, int, int, float]]:
    """(word, start ms, end ms, confidence) of each word; silence and noise marks left out."""
    decoder.start_utt()
    decoder.process_raw(pcm, no_search=False, full_utt=True)
    decoder.end_utt()
    return [
        # "read(2)" is the second way to say "read".
        (
            piece.word.partition("(")[0],
            piece.start_frame * _FRAME_MS,
            (piece.end_frame + 1) * _FRAME_MS,
            min(1.0, float(piece.prob)),
        )
        for piece in decoder.seg() or ()
        if not piece.word.startswith(("<", "["))
    ]


def _serve(pipe: Connection) -> None:
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=float(SAMPLE_RATE), loglevel="FATAL")
    fresh = decoder.get_cmn(False)
    pipe.send_bytes(b"ready")
    while True:
        pcm = pipe.recv_bytes()
        decoder.set_cmn(fresh)
        decoder.start_stream()  # forgets the noise
        pipe.send(_decode(decoder, pcm))


def _main() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    _main()
