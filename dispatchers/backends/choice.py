"""Which engine of a pool a piece of work goes to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dispatchers.backends.member import Member

STICK_S = 0.25
"""A stream's partials stay with their engine until they would wait for so much longer there than elsewhere."""
MOST_TIES = 4096


def best(members: Iterable[Member], model: str, but: Collection[Member] = ()) -> Member | None:
    """The engine where live work for this model would wait least. One that was let out is better than none."""
    able = {
        member: estimate_s
        for member in members
        if member.takes_work
        and not member.full
        and member not in but
        and (estimate_s := member.estimate_s(model)) is not None
    }
    chosen = [member for member in able if not member.record.out] or able
    return min(chosen, key=lambda member: (able[member], member.burden_s, member.in_flight), default=None)


@dataclass(slots=True)
class _Tie:
    member: Member
    under_way: int = 0


class Ties:
    """The engines that streams' partials go to: only where all of a stream's are can a newer take the place of an older
    one."""

    def __init__(self) -> None:
        self._ties: OrderedDict[str, _Tie] = OrderedDict()  # by stream, the one used last at the end

    @contextmanager
    def tied(self, stream: str, model: str, members: Iterable[Member]) -> Iterator[Member | None]:
        """The engine for a partial of this stream, while it is asked; None where there is none for it now."""
        elsewhere = best(members, model)
        tie = self._ties.get(stream)
        if tie is None or not _holds(tie, model, elsewhere):
            if elsewhere is None:
                yield None
                return
            tie = _Tie(elsewhere)
        if stream:
            self._ties[stream] = tie
            self._ties.move_to_end(stream)
            while len(self._ties) > MOST_TIES:
                self._ties.popitem(last=False)
        tie.under_way += 1
        try:
            yield None if tie.member.full else tie.member
        finally:
            tie.under_way -= 1


def _holds(tie: _Tie, model: str, elsewhere: Member | None) -> bool:
    member, estimate_s = tie.member, tie.member.estimate_s(model)
    if not member.takes_work or estimate_s is None:
        return False
    if tie.under_way:
        return True
    other_s = None if elsewhere is None else elsewhere.estimate_s(model)
    return not member.record.out and (other_s is None or estimate_s <= other_s + STICK_S)
