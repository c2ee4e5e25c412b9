"""Which engine of a pool is let out for a while, because it does worse than its peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

FAILURES = 3
"""So many in a row, whatever they were."""
SLOWER, SLOWER_S = 4.0, 0.5
"""Its finals take so many times as long as its peers' (their median), and so many seconds longer."""
ENOUGH = 8
"""So many finals say how long an engine takes."""
OUT_S, OUT_MOST_S = 5.0, 300.0
FORGIVEN_S = 300.0
"""An engine that did well for so long is let out for `OUT_S` again, not for twice the last time."""
_SMOOTHING = 0.2


class Record:
    """How an engine has done of late. `now` is a clock in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._until = 0.0
        self._out_s = 0.0
        self.reason = ""
        self._begin()

    def _begin(self) -> None:
        self.failures = 0
        self.finals = 0
        self.final_s = 0.0

    @property
    def out(self) -> bool:
        """Whether it is let out now."""
        return self._now() < self._until

    def failed(self) -> None:
        self.failures += 1

    def succeeded(self, final_s: float | None) -> None:
        """`final_s`: what it took, if it was a final, from sending it to its answer."""
        self.failures = 0
        if final_s is not None:
            self.finals += 1
            step = max(_SMOOTHING, 1 / self.finals)
            self.final_s += step * (final_s - self.final_s)

    def let_out(self, reason: str) -> float:
        """Lets it out; for how many seconds. What it did before is then forgotten."""
        forgiven = self._now() > self._until + FORGIVEN_S
        self._out_s = OUT_S if forgiven or not self._out_s else min(2 * self._out_s, OUT_MOST_S)
        self._until = self._now() + self._out_s
        self.reason = reason
        self._begin()
        return self._out_s


def complaint(record: Record, peers: Sequence[Record]) -> str | None:
    """Why this engine is to be let out, or None. `peers`: the others that are ready."""
    if record.failures >= FAILURES:
        return "failing"
    measured = [peer.final_s for peer in peers if peer.finals >= ENOUGH]
    if record.finals < ENOUGH or not measured:
        return None
    usual_s = statistics.median(measured)
    return "slow" if record.final_s > max(SLOWER * usual_s, usual_s + SLOWER_S) else None


def may_go(ready: Sequence[Record]) -> bool:
    """Whether one more may be let out: never more than half of those that are ready."""
    return 2 * (sum(record.out for record in ready) + 1) <= len(ready)
