"""One live stream's utterances, made of AssemblyAI's turns.

A turn is told as a whole again and again. An utterance begins with its first words. Words that will not change are
deltas, the others only in a partial. It ends with the turn, or where it is cut: at a flush that is not answered. Where
the text of a turn is formatted when it has ended, that is the utterance's, and it is `revised`; should it not come, the
utterance is what it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dispatchers.backends.assemblyai_wire import Turn, words_of
from dispatchers.backends.said import clean, known, language_of, sayable
from dispatchers.deltas import Deltas
from dispatchers.interface import Cleared, Delta, Event, Final, Gap, Options, Partial, SpeechStarted, Word


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    """What was heard of an utterance. Its first `firm` words will not change."""

    text: str
    words: tuple[Word, ...]
    firm: int
    start_ms: int
    end_ms: int


@dataclass(slots=True)
class _Utterance:
    number: int
    start_ms: int
    newest: _Hypothesis
    told: Deltas = field(default_factory=Deltas)
    told_ms: int = 0
    shown: str = ""
    language: str | None = None
    ended: bool = False  # its formatted text is awaited


class Turns:
    """Takes turns, gives events. `heard_ms` is always how much audio there was: no time lies after it, none goes back,
    whatever AssemblyAI says. `formatted`: ended turns are told once more."""

    def __init__(self, options: Options, *, formatted: bool):
        self._options = options
        self._formatted = formatted
        self._count = 0
        self._open: _Utterance | None = None
        self._order = -1  # the turn being told
        self._over = False  # it has ended
        self._floor_ms = 0  # nothing new begins before
        self._told_ms = 0  # words before have been told, or are not wanted
        self._cut = False  # the turn has such words
        self._clearing = False
        self._dropped_ms: int | None = None  # where what was dropped begins
        self._signs = 0  # of all finals

    @property
    def is_open(self) -> bool:
        """Whether an utterance is under way."""
        return self._open is not None

    @property
    def awaits_format(self) -> bool:
        """Whether the words are all there, and only their form is to come."""
        return self._open is not None and self._open.ended

    @property
    def is_too_long(self) -> bool:
        """Whether the utterance is to end now."""
        newest = None if self._open is None else self._open.newest
        return newest is not None and newest.end_ms - newest.start_ms >= self._options.vad.max_utterance_ms

    def turn(self, said: Turn, heard_ms: int) -> list[Event]:
        """A turn as far as it was heard. Raises `BadAnswer` where that is more than anybody could have said."""
        if said.turn_order < self._order or (said.turn_order == self._order and self._over):
            return []
        events: list[Event] = []
        if said.turn_order > self._order:
            events = self._end()
            self._order, self._over, self._cut = said.turn_order, False, False
        hypothesis = self._hypothesis(said, heard_ms)
        if hypothesis is not None:
            events += self._hear(hypothesis, known(said.language_code or ""))
        if said.end_of_turn:
            events += self._turn_over(said)
        return events

    def settle(self) -> list[Event]:
        """The formatted text does not come."""
        self._over = True
        return self._end()

    def finish(self) -> list[Event]:
        """What may change stays as it is. What comes of its turn later is what was said later."""
        if self._open is not None:
            self._told_ms, self._cut = max(self._told_ms, self._open.newest.end_ms), True
        return self._end()

    def drop(self, heard_ms: int) -> None:
        """Forgets the utterance being heard; what is yet to be said of it will not be told."""
        self._dropped_ms = None if self._open is None else self._open.start_ms
        self._open = None
        self._told_ms, self._cut, self._clearing = heard_ms, True, True

    def dropped(self, heard_ms: int) -> list[Event]:
        """What came of `drop`, when what was under way then has been answered."""
        start_ms, self._dropped_ms, self._clearing = self._dropped_ms, None, False
        self._floor_ms = max(self._floor_ms, heard_ms)
        gap: list[Event] = [] if start_ms is None else [Gap(start_ms, heard_ms, "cleared")]
        return [*gap, Cleared(heard_ms)]

    # --- utterances ---

    def _hear(self, hypothesis: _Hypothesis, language: str | None) -> list[Event]:
        events: list[Event] = []
        if self._open is None:
            self._count += 1
            self._open = _Utterance(self._count, hypothesis.start_ms, hypothesis)
            events.append(SpeechStarted(self._count, hypothesis.start_ms))
        utterance = self._open
        utterance.newest = hypothesis
        utterance.language = language or utterance.language
        return [*events, *self._firm(utterance), *self._suppose(utterance)] if self._options.partials else events

    def _firm(self, utterance: _Utterance) -> list[Event]:
        """Words that have become firm. Where others had been told in their place, the final will say so."""
        newest = utterance.newest
        words = newest.words[: newest.firm]
        text = Deltas()
        for word in words:
            text.add(word.text)
        return self._add(utterance, text.said, words[-1].end_ms if words else newest.end_ms)

    def _add(self, utterance: _Utterance, text: str, end_ms: int) -> list[Event]:
        rest = _continued(utterance.told, text)
        if not rest:
            return []
        utterance.told.said += rest
        start_ms = max(utterance.told_ms, utterance.start_ms)
        utterance.told_ms = max(end_ms, start_ms)
        return [Delta(utterance.number, rest, start_ms, utterance.told_ms)]

    def _suppose(self, utterance: _Utterance) -> list[Event]:
        text, told = utterance.newest.text, utterance.told.said
        if not _continued(utterance.told, text) or text == utterance.shown:
            return []
        utterance.shown = text
        return [Partial(utterance.number, text, len(told), utterance.start_ms, utterance.newest.end_ms)]

    def _turn_over(self, said: Turn) -> list[Event]:
        if self._formatted and not said.turn_is_formatted and self._open is not None:
            self._open.ended = True
            return []
        self._over = True
        return self._end()

    def _end(self) -> list[Event]:
        utterance, self._open = self._open, None
        if utterance is None:
            return []
        newest = utterance.newest
        events = self._add(utterance, newest.text, newest.end_ms) if self._options.partials else []
        self._signs += len(newest.text)
        self._floor_ms = max(newest.end_ms, utterance.start_ms + 1)
        sure = [word.confidence for word in newest.words]
        final = Final(
            utterance.number,
            newest.text,
            utterance.start_ms,
            self._floor_ms,
            language=utterance.language or language_of(None, self._options.language),
            confidence=sum(sure) / len(sure) if sure else 0.0,
            words=newest.words if self._options.words else (),
            revised=utterance.told.said not in ("", newest.text),
        )
        return [*events, final]

    # --- words ---

    def _hypothesis(self, said: Turn, heard_ms: int) -> _Hypothesis | None:
        """What the turn says of the utterance; None: nothing."""
        least_ms = self._floor_ms if self._open is None else self._open.start_ms
        if least_ms >= heard_ms:
            return None  # there is no audio that this could be about
        said_words = tuple(word for word in said.words if clean(word.text))
        kept = tuple(word for word in said_words if word.start + word.end >= 2 * self._told_ms)
        whole = len(kept) == len(said_words)
        if not whole and self._clearing and self._dropped_ms is None:
            self._dropped_ms = min(max(said_words[0].start, least_ms), heard_ms - 1)
        words = words_of(kept, least_ms, heard_ms)
        firm = next((at for at, word in enumerate(kept) if not word.word_is_final), len(kept))
        text = self._text(said, words, whole=whole)
        if not text:
            return None
        sayable(self._signs + len(text), heard_ms)
        start_ms = min(words[0].start_ms if words else least_ms, heard_ms - 1)
        end_ms = max([word.end_ms for word in words], default=heard_ms)
        if self._open is not None:
            start_ms = self._open.start_ms
        return _Hypothesis(text, words, firm, start_ms, max(end_ms, start_ms + 1))

    def _text(self, said: Turn, words: tuple[Word, ...], *, whole: bool) -> str:
        """Of an ended turn as it was written; else that of the words, for a transcript lacks those that may change."""
        as_written = said.end_of_turn if words else not self._cut
        if whole and as_written and (text := clean(said.transcript)):
            return text
        joined = Deltas()
        for word in words:
            joined.add(word.text)
        return joined.said


def _continued(told: Deltas, text: str) -> str:
    """What the text has beyond what was told, with the space before it; nothing where it does not go on from there."""
    rest = told.rest(text)
    return rest if rest and told.spaced(rest.strip()) == rest else ""
