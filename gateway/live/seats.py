"""How many live sessions a process has room for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dispatchers.errors import Overloaded

FULL_RETRY_S = 5


class Seats:
    """How many live sessions this process holds."""

    def __init__(self) -> None:
        self.taken = 0

    @contextmanager
    def seat(self, limit: int) -> Iterator[None]:
        """Raises `Overloaded` when all are taken."""
        if self.taken >= limit:
            raise Overloaded(retry_after_s=FULL_RETRY_S)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


SEATS = Seats()
