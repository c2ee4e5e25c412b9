"""Whether a backend can be asked now: one breaker for each pair of backend and credential, one retry budget for each
backend. Both are pure: they count what they are told, on a clock they are given.

The figures are Envoy's to start with (outlier detection: 5 failures in a row, ejected for longer each time, 5 minutes
at most; retry budget: 20 %). A provider that says "not now" (429) is left alone for as long as it asks, and has not
failed; a key that is not accepted stays useless until there is another; a request that is refused says nothing about
the backend.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dispatchers.errors import (
    AudioError,
    BackendUnavailable,
    CredentialRefused,
    DispatchError,
    OptionError,
    Overloaded,
    Superseded,
    Throttled,
)
from runtime.errors import StenogateError
from runtime.telemetry import BACKEND_COOL_DOWNS, BREAKER_TRANSITIONS

Clock: TypeAlias = Callable[[], float]
State: TypeAlias = Literal["closed", "open", "half_open", "cooling", "refused"]

STATES: tuple[State, ...] = ("closed", "open", "half_open", "cooling", "refused")


@dataclass(frozen=True, slots=True)
class Limits:
    """When a breaker opens, and for how long. Seconds; `share` of at least `least` outcomes in `window_s`."""

    in_a_row: int = 5
    share: float = 0.5
    least: int = 10
    window_s: float = 30.0
    open_s: float = 5.0
    open_most_s: float = 300.0
    cool_s: float = 5.0


class Breaker:
    """Of one backend with one credential. `backend` is the policy's name for it.

    closed: requests pass. open: none does. half open: the time is over; one passes, and decides. cooling: the provider
    asked for a pause. refused: it does not accept the credential; only another breaker, of another credential, helps.
    """

    def __init__(self, backend: str, limits: Limits | None = None, *, clock: Clock = time.monotonic):
        self.backend = backend
        self._limits = limits or Limits()
        self._clock = clock
        self._outcomes: deque[tuple[float, bool]] = deque(maxlen=256)
        self._failed_in_a_row = 0
        self._openings = 0  # in a row
        self._open_until: float | None = None
        self._cool_until = 0.0
        self._closed_at = clock()
        self._probing = False
        self._refusal: str | None = None
        self._told: State = "closed"

    @property
    def state(self) -> State:
        if self._refusal is not None:
            return "refused"
        now = self._clock()
        if self._open_until is not None:
            return "open" if now < self._open_until else "half_open"
        return "cooling" if now < self._cool_until else "closed"

    @property
    def up(self) -> bool:
        """Whether a request would pass now."""
        state = self.state
        return state == "closed" or (state == "half_open" and not self._probing)

    @property
    def retry_after_s(self) -> float | None:
        """When a request may pass again. None: not by itself."""
        if self._refusal is not None:
            return None
        until = self._cool_until if self._open_until is None else self._open_until
        return max(0.0, until - self._clock())

    @property
    def why_down(self) -> str:
        """For people."""
        match self.state:
            case "refused":
                return self._refusal or ""
            case "cooling":
                return "The provider asked for a pause."
            case "open" | "half_open":
                return "The backend has failed too often. It is tried again shortly."
            case "closed":
                return "The backend is up."

    def enter(self) -> Trial:
        """One request, whose outcome is awaited. Raises `BackendUnavailable` where none may pass."""
        if not self.up:
            raise BackendUnavailable(f"{self.backend}: {self.why_down}", retry_after_s=self.retry_after_s)
        decides = self.state == "half_open"
        self._probing = self._probing or decides
        self._tell()
        return Trial(self, decides=decides)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A request that is over with the block. One that is cancelled has no outcome."""
        trial = self.enter()
        try:
            yield
        except Exception as error:
            trial.end(error)
            raise
        else:
            trial.end(None)
        finally:
            trial.leave()

    def note(self, error: Exception | None) -> None:
        """An outcome; None: a good one."""
        match error:
            case None:
                self._answered()
                self._failed_in_a_row = 0
                self._outcomes.append((self._clock(), True))
            case CredentialRefused(message=message):
                self._refusal = message
            case Throttled(retry_after_s=seconds):
                BACKEND_COOL_DOWNS.labels(self.backend).inc()
                self._answered()
                self._cool_until = self._clock() + (self._limits.cool_s if seconds is None else seconds)
            case Overloaded() | Superseded() | OptionError() | AudioError():
                pass  # it was not asked, or did what it could
            case DispatchError(elsewhere=False):
                self._answered()
            case StenogateError() if not isinstance(error, DispatchError):
                pass  # not of its making
            case _:
                self._failed()
        self._tell()

    def no_more_probe(self) -> None:
        """The request that was to decide is over."""
        self._probing = False

    def _answered(self) -> None:
        """It lives."""
        if self._open_until is not None and self.state == "half_open":
            self._open_until = None
            self._closed_at = self._clock()
            self._failed_in_a_row = 0
            self._outcomes.clear()

    def _failed(self) -> None:
        now = self._clock()
        self._failed_in_a_row += 1
        self._outcomes.append((now, False))
        if self.state == "half_open" or (self.state != "open" and self._too_many(now)):
            self._open(now)

    def _too_many(self, now: float) -> bool:
        limits = self._limits
        if self._failed_in_a_row >= limits.in_a_row:
            return True
        recent = [good for at, good in self._outcomes if now - at <= limits.window_s]
        return len(recent) >= limits.least and recent.count(False) >= limits.share * len(recent)

    def _open(self, now: float) -> None:
        limits = self._limits
        if self._open_until is None and now - self._closed_at > limits.open_most_s:
            self._openings = 0  # it was well for long enough
        self._open_until = now + min(limits.open_s * 2**self._openings, limits.open_most_s)
        self._openings = min(self._openings + 1, 32)

    def _tell(self) -> None:
        state = self.state
        if state != self._told:
            self._told = state
            BREAKER_TRANSITIONS.labels(self.backend, state).inc()


class Trial:
    """A request that was let pass. Its first outcome counts; to be left whatever happens."""

    def __init__(self, breaker: Breaker, *, decides: bool):
        self._breaker = breaker
        self._decides = decides
        self._over = False

    def end(self, error: Exception | None) -> None:
        """None: it went well. What comes later of the same request, a failure of a stream say, counts for itself."""
        if not self._over or error is not None:
            self._breaker.note(error)
        self.leave()

    def leave(self) -> None:
        """Without an outcome, if it had none yet."""
        if self._decides and not self._over:
            self._breaker.no_more_probe()
        self._over = True


class RetryBudget:
    """How many of a backend's requests may be tried again elsewhere: a `share` of those in the last `window_s`, and
    always `least`. So a backend that fails at every other request does not make half as many again of the next one's.
    """

    def __init__(
        self, share: float = 0.2, *, least: int = 10, window_s: float = 10.0, clock: Clock = time.monotonic
    ) -> None:
        self._share = share
        self._least = least
        self._window_s = window_s
        self._clock = clock
        self._began = clock()
        self._requests = [0, 0]  # in this window and the one before
        self._retries = [0, 0]

    def asked(self) -> None:
        """A request came to the backend."""
        self._turn()
        self._requests[0] += 1

    def take(self) -> bool:
        """Whether one of them may be tried elsewhere; it then is."""
        self._turn()
        if sum(self._retries) >= max(self._least, self._share * sum(self._requests)):
            return False
        self._retries[0] += 1
        return True

    def _turn(self) -> None:
        passed = int((self._clock() - self._began) / self._window_s)
        if passed:
            self._began += passed * self._window_s
            for counts in (self._requests, self._retries):
                counts[:] = [0, counts[0] if passed == 1 else 0]
