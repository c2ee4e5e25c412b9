"""How long after a sound was received its text went out."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque

from dispatchers.interface import Event, Final, Partial, SpeechStarted

_RECEIPT_EVERY_MS = 50
_RECEIPTS = 4_096  # at least 200 s of audio
_FIGURES = 512


class Latency:
    """One session's. Audio times are ms on its sample clock, receipt times seconds of a steady clock, figures ms.

    `first_partial`: from the receipt of an utterance's first audio (pre-roll included) to its first hypothesis.
    `final`: from the receipt of an utterance's last audio to its final. `coalesced` and `dropped`: partials of finished
    utterances that were due and never told (see `Final`).
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.first_partial: deque[int] = deque(maxlen=_FIGURES)
        self.final: deque[int] = deque(maxlen=_FIGURES)
        self.coalesced = 0
        self.dropped = 0
        self._receipts: deque[tuple[int, float]] = deque(maxlen=_RECEIPTS)
        self._awaited: dict[int, int] = {}  # utterance announced and without hypothesis: where it starts

    def received(self, until_ms: int, now: float) -> None:
        """Audio up to `until_ms` has come."""
        if not self._receipts or until_ms - self._receipts[-1][0] >= _RECEIPT_EVERY_MS:
            self._receipts.append((until_ms, now))

    def note(self, event: Event, now: float) -> tuple[str, int] | None:
        """The figure that this event gives, by name."""
        self.sent[type(event).__name__] += 1
        match event:
            case SpeechStarted(utterance, start_ms):
                self._awaited[utterance] = start_ms
            case Partial(utterance=utterance) if utterance in self._awaited:
                return self._figure("first_partial", self.first_partial, self._awaited.pop(utterance), now)
            case Final(utterance=utterance, end_ms=end_ms, coalesced=coalesced, dropped=dropped):
                self.coalesced += coalesced
                self.dropped += dropped
                self._awaited.pop(utterance, None)
                return self._figure("final", self.final, end_ms, now)
            case _:
                pass
        return None

    def _figure(self, name: str, figures: deque[int], at_ms: int, now: float) -> tuple[str, int] | None:
        receipt = self._receipt(at_ms)
        if receipt is None:
            return None
        figures.append(max(0, round((now - receipt) * 1000)))
        return name, figures[-1]

    def _receipt(self, at_ms: int) -> float | None:
        """When the audio at `at_ms` had come; None when that was too long ago to be remembered."""
        if not self._receipts or at_ms < self._receipts[0][0] - _RECEIPT_EVERY_MS:
            return None
        place = bisect_left(self._receipts, at_ms, key=lambda receipt: receipt[0])
        return self._receipts[min(place, len(self._receipts) - 1)][1]
