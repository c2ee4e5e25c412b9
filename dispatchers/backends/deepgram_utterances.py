"""One live stream's utterances, made of what Deepgram says of it.

An utterance begins with Deepgram's `SpeechStarted`, or with its first words. What is final of it is a delta; what is
not yet, only in a partial. It ends where Deepgram finds a pause (`speech_final`), where it misses words for long enough
(`UtteranceEnd`: noise hides pauses), or at the first final words after its longest duration.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dispatchers.backends.deepgram_wire import Alternative, Results, words_of
from dispatchers.backends.relay import at_ms
from dispatchers.backends.said import clean, known, language_of, sayable, share
from dispatchers.deltas import Deltas
from dispatchers.interface import Cleared, Delta, Event, Final, Gap, Options, Partial, SpeechStarted, Word

_SEAM_MS = 20
"""Where two ranges of audio meet, their times may differ by so much."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """What was heard between two times."""

    text: str
    start_ms: int
    end_ms: int
    words: tuple[Word, ...]
    confidence: float
    languages: tuple[str, ...]


@dataclass(slots=True)
class _Utterance:
    number: int
    start_ms: int
    said: Deltas = field(default_factory=Deltas)
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def end_ms(self) -> int:
        return self.pieces[-1].end_ms if self.pieces else self.start_ms


class Utterances:
    """Takes what Deepgram says, gives events. `heard_ms` is always how much audio it has been sent: no time lies
    after it, none goes back, whatever Deepgram says."""

    def __init__(self, options: Options):
        self._options = options
        self._count = 0
        self._open: _Utterance | None = None
        self._unsure: Results | None = None  # the newest words that may change
        self._final_ms = 0  # until here the text will not change
        self._floor_ms = 0  # nothing new begins before
        self._over_ms = 0  # of what was said before nobody wants to hear any more
        self._dropped_ms: int | None = None  # where what was dropped begins
        self._signs = 0  # of all that is final

    @property
    def unsure(self) -> bool:
        """Whether words were told that may change."""
        return self._unsure is not None

    def covers(self, until_ms: int) -> bool:
        """Whether what was said before is final."""
        return self._final_ms >= until_ms - _SEAM_MS

    def results(self, said: Results, heard_ms: int) -> list[Event]:
        """Words, final or not. Raises `BadAnswer` where there are more than anybody could have said."""
        piece = self._piece(said, heard_ms)
        if not said.is_final:
            self._unsure = None if piece is None else said
            return [] if piece is None else self._suppose(piece)
        self._unsure = None
        self._final_ms = at_ms(said.start + said.duration, self._final_ms, heard_ms)
        events = [] if piece is None else self._add(piece)
        if self._is_over(speech_final=said.speech_final):
            events += self._end(self._final_ms)
        return events

    def began(self, timestamp: float, heard_ms: int) -> list[Event]:
        """Speech, of which no word is known yet."""
        start_ms = at_ms(timestamp, self._floor_ms, heard_ms)
        if self._open is not None or start_ms < self._over_ms or start_ms >= heard_ms:
            return []
        return self._begin(start_ms)[1]

    def ended(self, last_word_end: float, heard_ms: int) -> list[Event]:
        """No word for long enough. One that is late, or told of words that are not final yet, ends nothing."""
        if self._open is None or (self._unsure is not None and not self._open.pieces):
            return []
        late = self._open.pieces and at_ms(last_word_end, 0, heard_ms) < self._open.start_ms
        return [] if late else self._end(heard_ms)

    def finish(self, heard_ms: int) -> list[Event]:
        """Everything sent so far has been answered, or will not be: what may change stays as it is."""
        piece = self._unsure_piece(heard_ms)
        events = [] if piece is None else self._add(piece)
        self._unsure = None
        self._over_ms = self._final_ms = heard_ms
        return events + self._end(heard_ms)

    def drop(self, heard_ms: int) -> None:
        """Forgets the utterance being heard; what is yet to be said of it will not be told."""
        begun = self._open or self._unsure_piece(heard_ms)
        self._dropped_ms = None if begun is None else begun.start_ms
        self._open = self._unsure = None
        self._over_ms = heard_ms

    def dropped(self, heard_ms: int) -> list[Event]:
        """What came of `drop`, when what was under way then has been answered."""
        start_ms, self._dropped_ms = self._dropped_ms, None
        self._floor_ms = max(self._floor_ms, heard_ms)
        gap: list[Event] = [] if start_ms is None else [Gap(start_ms, heard_ms, "cleared")]
        return [*gap, Cleared(heard_ms)]

    # --- utterances ---

    def _begin(self, start_ms: int) -> tuple[_Utterance, list[Event]]:
        self._count += 1
        self._open = _Utterance(self._count, start_ms)
        return self._open, [SpeechStarted(self._count, start_ms)]

    def _of(self, piece: _Piece) -> tuple[_Utterance, list[Event]]:
        """The utterance that the words belong to, and its announcement, if it begins with them."""
        return self._begin(piece.start_ms) if self._open is None else (self._open, [])

    def _suppose(self, piece: _Piece) -> list[Event]:
        utterance, events = self._of(piece)
        if self._options.partials:
            stable = utterance.said.said
            text = stable + utterance.said.spaced(piece.text)
            events.append(Partial(utterance.number, text, len(stable), utterance.start_ms, piece.end_ms))
        return events

    def _add(self, piece: _Piece) -> list[Event]:
        utterance, events = self._of(piece)
        delta = utterance.said.add(piece.text)
        utterance.pieces.append(piece)
        self._signs += len(piece.text)
        if self._options.partials:
            events.append(Delta(utterance.number, delta, piece.start_ms, piece.end_ms))
        return events

    def _is_over(self, *, speech_final: bool) -> bool:
        """Speech of which no words came was none."""
        if self._open is None:
            return False
        lasted_ms = self._final_ms - self._open.start_ms
        if not self._open.pieces:
            return lasted_ms >= self._options.vad.silence_ms
        return speech_final or lasted_ms >= self._options.vad.max_utterance_ms

    def _end(self, until_ms: int) -> list[Event]:
        utterance, self._open = self._open, None
        if utterance is None:
            return []
        self._floor_ms = max(utterance.end_ms if utterance.pieces else until_ms, utterance.start_ms + 1)
        return [self._final(utterance, self._floor_ms)]

    def _final(self, utterance: _Utterance, end_ms: int) -> Final:
        words = [word for piece in utterance.pieces for word in piece.words]
        sure = [word.confidence for word in words] or [piece.confidence for piece in utterance.pieces]
        languages = Counter(language for piece in utterance.pieces for language in piece.languages)
        return Final(
            utterance.number,
            utterance.said.said,
            utterance.start_ms,
            end_ms,
            language=languages.most_common(1)[0][0] if languages else language_of(None, self._options.language),
            confidence=sum(sure) / len(sure) if sure else 0.0,
            words=tuple(words) if self._options.words else (),
        )

    # --- words ---

    def _unsure_piece(self, heard_ms: int) -> _Piece | None:
        return None if self._unsure is None else self._piece(self._unsure, heard_ms)

    def _piece(self, said: Results, heard_ms: int) -> _Piece | None:
        """What is new of what was said; None: nothing."""
        best = said.channel.alternatives[0]
        least_ms = self._floor_ms if self._open is None else self._open.end_ms
        if least_ms >= heard_ms:
            return None  # there is no audio that this could be about
        start_ms = at_ms(said.start, least_ms, heard_ms)
        end_ms = at_ms(said.start + said.duration, start_ms, heard_ms)
        words, text = words_of(best.words, start_ms, end_ms), clean(best.transcript)
        if said.start * 1000 < self._over_ms - _SEAM_MS:
            words, text = self._after(words)
        if not text:
            return None
        sayable(self._signs + len(text), heard_ms)
        if words:
            start_ms, end_ms = words[0].start_ms, max(word.end_ms for word in words)
        start_ms = min(start_ms, heard_ms - 1)
        return _Piece(text, start_ms, max(end_ms, start_ms + 1), words, share(best.confidence), _languages(best))

    def _after(self, words: tuple[Word, ...]) -> tuple[tuple[Word, ...], str]:
        """Of words that were said about the audio before and after what is over: those after."""
        left = tuple(word for word in words if word.start_ms + word.end_ms >= 2 * self._over_ms)
        if len(left) < len(words) and self._dropped_ms is None:
            self._dropped_ms = words[0].start_ms
        text = Deltas()
        for word in left:
            text.add(word.text)
        return left, text.said


def _languages(said: Alternative) -> tuple[str, ...]:
    tags = [word.language for word in said.words if word.language] or list(said.languages[:1])
    return tuple(code for tag in tags if (code := known(tag)))
