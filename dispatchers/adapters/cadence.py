"""When a stream asks for its next hypothesis."""

from __future__ import annotations

from collections.abc import Callable

from dispatchers.interface import SAMPLES_PER_MS


class Cadence:
    """A hypothesis is due for every `interval_ms` of new speech, the first as soon as an utterance is announced. After
    one the stream rests for as long as that took, waiting included, so that a busy engine is asked less often. Speech
    is counted in samples, rest in seconds of `clock`.
    """

    def __init__(self, interval_ms: int, clock: Callable[[], float]):
        self._interval = interval_ms * SAMPLES_PER_MS
        self._clock = clock
        self._due = 0
        self._begun = 0.0
        self._rest_until = 0.0

    def restart(self) -> None:
        """An utterance begins."""
        self._due, self._rest_until = 0, 0.0

    def due(self, voiced_until: int) -> bool:
        """Whether speech up to here is enough for a hypothesis; if so, the next one takes another `interval_ms`."""
        if voiced_until < self._due:
            return False
        self._due = voiced_until + self._interval
        return True

    @property
    def resting(self) -> bool:
        return self._clock() < self._rest_until

    def begin(self) -> None:
        """A hypothesis is asked for, in no other's place."""
        self._begun = self._clock()

    def rest(self) -> None:
        """It has come, or is wanted no more."""
        self._rest_until = 2 * self._clock() - self._begun
