"""Several threads, each at its own work, that meet at one model: calls that can go together do.

A call waits until every member has called or left. Then the calls of one kind are answered by one batch. So what goes
together needs no knowledge of the work around it, and each member's work reads as if it were alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(eq=False, slots=True)
class _Call:
    kind: Hashable
    argument: Any
    together: Callable[[Sequence[Any]], Sequence[Any]]
    taken: bool = False
    done: bool = False
    result: Any = None
    failure: Exception | None = None


class Meeting:
    """Of so many members. Every member must `leave` in the end, whatever happened to it; one that neither calls nor
    leaves holds up the others."""

    def __init__(self, members: int = 1) -> None:
        self.members = members
        self._calls: list[_Call] = []
        self._change = threading.Condition()

    def call(self, kind: Hashable, argument: T, together: Callable[[Sequence[T]], Sequence[R]]) -> R:
        """`together([argument])[0]`, or what it is among the arguments of the others of this kind. Members whose calls
        are of one kind must mean the same by `together`. When a batch fails, each of it is tried alone."""
        mine = _Call(kind, argument, together)
        with self._change:
            self._calls.append(mine)
            self._change.notify_all()
            self._change.wait_for(lambda: mine.taken or len(self._calls) >= self.members)
            all_here: list[_Call] = []
            if not mine.taken:
                all_here, self._calls = self._calls, []
                for call in all_here:
                    call.taken = True
        if all_here:
            self._answer(all_here)
        with self._change:
            self._change.wait_for(lambda: mine.done)
        if mine.failure is not None:
            raise mine.failure
        result: R = mine.result
        return result

    def leave(self) -> None:
        """One member less."""
        with self._change:
            self.members -= 1
            self._change.notify_all()

    def _answer(self, calls: list[_Call]) -> None:
        kinds: dict[Hashable, list[_Call]] = {}
        for call in calls:
            kinds.setdefault(call.kind, []).append(call)
        for alike in kinds.values():
            _run(alike)
            with self._change:
                for call in alike:
                    call.done = True
                self._change.notify_all()


def _run(calls: list[_Call]) -> None:
    try:
        results = calls[0].together([call.argument for call in calls])
        for call, result in zip(calls, results, strict=True):
            call.result = result
    except Exception as failure:  # noqa: BLE001  # raised again where the call was made
        if len(calls) == 1:
            calls[0].failure = failure
            return
        for call in calls:
            _run([call])
