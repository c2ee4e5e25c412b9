"""The queue of one class of work, fair between shares by the audio they ask for, not by how often they ask.

Start-time fair queueing (Goyal, Vin and Cheng 1996): every share has a clock that runs by the seconds of audio served
to it, and the share whose clock is furthest behind is next. A share that comes back starts at the time of those who
wait, so nothing is saved up by having been idle. Within a share, first come first served.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future as ThreadFuture
from dataclasses import dataclass
from typing import Any

from dispatchers.interface import Urgency


@dataclass(eq=False, slots=True)
class Piece:
    """Work that waits. `turn` is answered with the thread's future once it has begun; `kind` is what those that may
    run together have in common, None for work that runs alone; `joined` is on the loop's clock."""

    work: Callable[..., Any]
    turn: asyncio.Future[ThreadFuture[Any]]
    joined: float
    urgency: Urgency
    share: str
    seconds: float
    stream: str
    kind: Hashable | None


class Line:
    """Waiting pieces. Who is chosen is taken out with `take`, which charges the share, or `leave`, which does not."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Piece]] = {}
        self._served: dict[str, float] = {}
        self._clock = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def join(self, piece: Piece) -> None:
        """To the end of its share's queue."""
        if piece.share not in self._queues:
            self._queues[piece.share] = deque()
            self._served[piece.share] = max(self._served.get(piece.share, 0.0), self._clock)
        self._queues[piece.share].append(piece)

    def replace(self, old: Piece, new: Piece) -> None:
        """`new` stands where `old` stood. Both are of one share."""
        queue = self._queues[old.share]
        queue[queue.index(old)] = new

    def leave(self, piece: Piece) -> bool:
        """Whether it was still there."""
        queue = self._queues.get(piece.share, deque())
        if piece not in queue:
            return False
        queue.remove(piece)
        if not queue:
            del self._queues[piece.share]
        return True

    def count(self, kind: Hashable) -> int:
        """How many of this kind wait."""
        return sum(piece.kind == kind for queue in self._queues.values() for piece in queue)

    def choose(self, kind: Hashable | None = None) -> Piece | None:
        """Who is next, of any kind or of this one."""
        for share in sorted(self._queues, key=self._served.__getitem__):
            for piece in self._queues[share]:
                if kind is None or piece.kind == kind:
                    return piece
        return None

    def take(self, piece: Piece) -> None:
        """Serves it: its share's clock runs on by its audio."""
        self._clock = max(self._clock, min(self._served[share] for share in self._queues))
        self._served[piece.share] += piece.seconds
        self.leave(piece)
        for share in [share for share, time in self._served.items() if time <= self._clock]:
            if share not in self._queues:
                del self._served[share]
